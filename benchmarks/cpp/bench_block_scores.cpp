#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "convert.h"
#include "lemo/block_scores.h"

namespace {

// One sequence in blocks of 64; as many key heads as query heads divided by `group`.
template <typename T>
void BM_BlockScores(benchmark::State& state) {
    const int64_t tokens = state.range(0), heads = state.range(1), group = state.range(2);
    constexpr int64_t kHeadDim = 64, kBlock = 64;
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    std::vector<T> q(static_cast<size_t>(tokens * heads * kHeadDim)), k(q.size() / group);
    for (T& value : q) lemo::cpu::store(&value, normal(generator));
    for (T& value : k) lemo::cpu::store(&value, normal(generator));
    const int64_t blocks = tokens / kBlock;
    std::vector<int32_t> starts(static_cast<size_t>(blocks + 1));
    for (size_t b = 0; b < starts.size(); ++b) starts[b] = static_cast<int32_t>(b * kBlock);
    std::vector<int32_t> cuts{0, static_cast<int32_t>(blocks)};
    std::vector<float> scores(static_cast<size_t>(blocks));

    const auto dtype = sizeof(T) == 4 ? lemo::DType::kFloat32 : lemo::DType::kBFloat16;
    const auto rows = [&](std::vector<T>& values, int64_t num_heads) {
        return lemo::Tensor{values.data(),
                            dtype,
                            lemo::Device::kCpu,
                            3,
                            {tokens, num_heads, kHeadDim},
                            {num_heads * kHeadDim, kHeadDim, 1}};
    };
    const auto line = [](void* data, lemo::DType type, int64_t size) {
        return lemo::Tensor{data, type, lemo::Device::kCpu, 1, {size}, {1}};
    };
    const lemo::BlockScoresParams params{rows(q, heads),
                                         rows(k, heads / group),
                                         line(starts.data(), lemo::DType::kInt32, blocks + 1),
                                         line(cuts.data(), lemo::DType::kInt32, 2),
                                         0.125,
                                         line(scores.data(), lemo::DType::kFloat32, blocks)};
    for (auto _ : state) lemo::block_scores_cpu(params);
    const double flops = static_cast<double>(tokens * tokens * heads * kHeadDim);  // causal half
    state.counters["FLOP/s"] = benchmark::Counter(
        flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}
BENCHMARK(BM_BlockScores<float>)->Args({4096, 6, 1})->Args({4096, 8, 4});
BENCHMARK(BM_BlockScores<lemo::cpu::BFloat16>)->Args({4096, 6, 1});

}  // namespace
