#include "lemo/block_attention.h"

#include <numeric>

#include "convert.h"
#include "lemo/blocks.h"
#include "random_values.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// The last rows of one sequence; arguments: tokens, rows, heads, head size, block size.
void BM_BlockAttention(benchmark::State& state) {
    const int64_t tokens = state.range(0), num_rows = state.range(1), heads = state.range(2);
    const int64_t head_dim = state.range(3);
    const lemo::BlockPlan plan = lemo::plan_blocks({tokens}, state.range(4));
    const auto blocks = static_cast<int64_t>(plan.block_starts.size()) - 1;
    std::vector<int32_t> last(static_cast<size_t>(num_rows));
    std::iota(last.begin(), last.end(), static_cast<int32_t>(tokens - num_rows));
    const DeviceArray<BFloat16> q(
        lemo::testing::random_values<BFloat16>(num_rows * heads * head_dim, 1));
    const DeviceArray<BFloat16> k(
        lemo::testing::random_values<BFloat16>(tokens * heads * head_dim, 2));
    const DeviceArray<int32_t> rows(last), starts(plan.block_starts), cuts(plan.cu_blocks);
    const DeviceArray<float> maximum(static_cast<size_t>(num_rows * heads * blocks));
    const DeviceArray<float> logsumexp(static_cast<size_t>(num_rows * heads * blocks));
    const lemo::BlockAttentionParams params{q.view({num_rows, heads, head_dim}),
                                            k.view({tokens, heads, head_dim}),
                                            rows.view({num_rows}),
                                            starts.view({blocks + 1}),
                                            cuts.view({2}),
                                            0.125,
                                            maximum.view({num_rows, heads, blocks}),
                                            logsumexp.view({num_rows, heads, blocks})};
    lemo::bench::measure(state, [&](void* stream) { block_attention_cuda(params, stream); });
    const auto flops = static_cast<double>(2 * num_rows * tokens * heads * head_dim);
    state.counters["FLOP/s"] = benchmark::Counter(
        flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}
BENCHMARK(BM_BlockAttention)
    ->Args({65536, 655, 4, 128, 64})
    ->Args({65536, 655, 4, 128, 512})
    ->Args({65536, 655, 4, 128, 16})
    ->Args({65536, 655, 4, 64, 64})
    ->Args({16384, 164, 4, 128, 64})
    ->UseManualTime();

}  // namespace
