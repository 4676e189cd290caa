#include <benchmark/benchmark.h>

#include <numeric>
#include <random>
#include <vector>

#include "convert.h"
#include "lemo/block_attention.h"
#include "lemo/blocks.h"

namespace {

// The last hundredth of one sequence's rows; arguments: tokens, block size.
template <typename T>
void BM_BlockAttention(benchmark::State& state) {
    const int64_t tokens = state.range(0), num_rows = tokens / 100;
    constexpr int64_t kHeads = 4, kHeadDim = 64;
    lemo::BlockPlan plan = lemo::plan_blocks({tokens}, state.range(1));
    const auto blocks = static_cast<int64_t>(plan.block_starts.size()) - 1;
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    std::vector<T> q(static_cast<size_t>(num_rows * kHeads * kHeadDim));
    std::vector<T> k(static_cast<size_t>(tokens * kHeads * kHeadDim));
    for (T& value : q) lemo::cpu::store(&value, normal(generator));
    for (T& value : k) lemo::cpu::store(&value, normal(generator));
    std::vector<int32_t> rows(static_cast<size_t>(num_rows));
    std::iota(rows.begin(), rows.end(), static_cast<int32_t>(tokens - num_rows));
    std::vector<float> maximum(static_cast<size_t>(num_rows * kHeads * blocks));
    std::vector<float> logsumexp(maximum.size());

    const auto dtype = sizeof(T) == 4 ? lemo::DType::kFloat32 : lemo::DType::kBFloat16;
    const auto cube = [](void* data, lemo::DType type, int64_t a, int64_t b, int64_t c) {
        return lemo::Tensor{data, type, lemo::Device::kCpu, 3, {a, b, c}, {b * c, c, 1}};
    };
    const auto line = [](std::vector<int32_t>& values) {
        const auto size = static_cast<int64_t>(values.size());
        return lemo::Tensor{values.data(), lemo::DType::kInt32, lemo::Device::kCpu, 1, {size}, {1}};
    };
    const lemo::BlockAttentionParams params{
        cube(q.data(), dtype, num_rows, kHeads, kHeadDim),
        cube(k.data(), dtype, tokens, kHeads, kHeadDim),
        line(rows),
        line(plan.block_starts),
        line(plan.cu_blocks),
        0.125,
        cube(maximum.data(), lemo::DType::kFloat32, num_rows, kHeads, blocks),
        cube(logsumexp.data(), lemo::DType::kFloat32, num_rows, kHeads, blocks)};
    for (auto _ : state) lemo::block_attention_cpu(params);
    const auto flops = static_cast<double>(2 * num_rows * tokens * kHeads * kHeadDim);
    state.counters["FLOP/s"] = benchmark::Counter(
        flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}
BENCHMARK(BM_BlockAttention<float>)->Args({16384, 64})->Args({16384, 512});
BENCHMARK(BM_BlockAttention<lemo::cpu::BFloat16>)->Args({16384, 64});

}  // namespace
