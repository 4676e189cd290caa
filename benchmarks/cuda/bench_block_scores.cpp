#include "lemo/block_scores.h"

#include "convert.h"
#include "random_values.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// One sequence in blocks of 64; arguments: tokens, query heads, key heads, head size.
void BM_BlockScores(benchmark::State& state, const char* kernel) {
    const int64_t tokens = state.range(0), heads = state.range(1), key_heads = state.range(2);
    const int64_t head_dim = state.range(3);
    const lemo::BlockPlan plan = lemo::plan_blocks({tokens}, 64);
    const auto blocks = static_cast<int64_t>(plan.block_starts.size()) - 1;
    // One block of random rows again and again: the power that a product draws depends on them.
    const auto fill = [&](const DeviceArray<BFloat16>& to, int64_t row) {
        const auto part = lemo::testing::random_values<BFloat16>(64 * row, 1);
        for (int64_t block = 0; block < blocks; ++block) {
            lemo::testing::require(
                cudaMemcpy(to.data() + block * 64 * row, part.data(),
                           part.size() * sizeof(BFloat16), cudaMemcpyHostToDevice),
                "upload");
        }
    };
    const DeviceArray<BFloat16> q(static_cast<size_t>(tokens * heads * head_dim));
    const DeviceArray<BFloat16> k(static_cast<size_t>(tokens * key_heads * head_dim));
    fill(q, heads * head_dim);
    fill(k, key_heads * head_dim);
    const DeviceArray<int32_t> starts(plan.block_starts), cuts(plan.cu_blocks);
    const DeviceArray<float> scores(static_cast<size_t>(blocks));
    lemo::BlockScoresParams params{q.view({tokens, heads, head_dim}),
                                   k.view({tokens, key_heads, head_dim}),
                                   starts.view({blocks + 1}),
                                   cuts.view({2}),
                                   0.125,
                                   scores.view({blocks}),
                                   nullptr,
                                   kernel};
    const lemo::testing::Scratch scratch(block_scores_scratch_bytes(params));
    params.scratch = scratch.data();
    lemo::bench::measure(state, [&](void* stream) { block_scores_cuda(params, stream); });
    const double flops = static_cast<double>(tokens * tokens * heads * head_dim);  // causal half
    state.counters["FLOP/s"] = benchmark::Counter(
        flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}
void with_shapes(benchmark::internal::Benchmark* bench) {
    bench->Args({65536, 32, 8, 128})->Args({16384, 32, 8, 128})->Args({4096, 32, 8, 128});
    bench->Args({16384, 32, 8, 64})->UseManualTime();
}
BENCHMARK_CAPTURE(BM_BlockScores, auto, "auto") -> Apply(with_shapes);
BENCHMARK_CAPTURE(BM_BlockScores, portable, "portable")->Apply(with_shapes);

}  // namespace
