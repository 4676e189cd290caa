#include "lemo/blocks.h"
#include "lemo/token_select.h"
#include "random_values.h"
#include "timing.h"

namespace {

using lemo::testing::DeviceArray;

// Half of the blocks of 64 tokens, from scores to rows, without a read-back.
void BM_TokenSelect(benchmark::State& state) {
    const int64_t sequences = state.range(1);
    const std::vector<int64_t> seqlens(static_cast<size_t>(sequences), state.range(0) / sequences);
    const lemo::BlockPlan plan = lemo::plan_blocks(seqlens, 64);
    const auto [num_kept, num_rows] = lemo::plan_selection(seqlens, 64, 0.5, 1, 1);
    const int64_t blocks = static_cast<int64_t>(plan.block_starts.size()) - 1;
    const DeviceArray<float> scores(lemo::testing::random_values<float>(blocks, 1));
    const DeviceArray<int32_t> starts(plan.block_starts), cuts(plan.cu_blocks);
    const DeviceArray<int32_t> places(2 * blocks), cu_kept(sequences + 1), cu_rows(sequences + 1);
    const DeviceArray<int32_t> kept(num_kept), rows(num_rows), positions(num_rows);
    const DeviceArray<int64_t> counts(2);
    const lemo::TokenSelectParams select{scores.view({blocks}),
                                         starts.view({blocks + 1}),
                                         cuts.view({sequences + 1}),
                                         "ratio",
                                         0.5,
                                         1,
                                         1,
                                         places.view({blocks, 2}),
                                         cu_kept.view({sequences + 1}),
                                         cu_rows.view({sequences + 1}),
                                         counts.view({2})};
    const lemo::TokenRowsParams list{select.block_starts,   select.cu_blocks,
                                     select.places,         select.cu_kept,
                                     select.cu_rows,        kept.view({num_kept}),
                                     rows.view({num_rows}), positions.view({num_rows})};
    lemo::bench::measure(state, [&](void* stream) {
        token_select_cuda(select, stream);
        token_rows_cuda(list, stream);
    });
    state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(BM_TokenSelect)->Args({65536, 1})->Args({65536, 16})->Args({1 << 20, 1})->UseManualTime();

}  // namespace
