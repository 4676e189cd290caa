#include "convert.h"
#include "lemo/residual_scatter.h"
#include "random_values.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// Half of the tokens, in blocks of 64: the shape of a layer at keep 0.5.
struct HalfKept {
    explicit HalfKept(const benchmark::State& state)
        : tokens(state.range(0)), hidden(state.range(1)), x(tokens * hidden),
          y(tokens / 2 * hidden), rows(lemo::testing::half_of_the_blocks(tokens)) {
        x.fill_zero();
        y.fill_zero();
    }

    int64_t tokens, hidden;
    DeviceArray<BFloat16> x, y;
    DeviceArray<int32_t> rows;
};

void BM_ResidualScatter(benchmark::State& state) {
    const HalfKept data(state);
    const lemo::ResidualScatterParams params{data.x.view({data.tokens, data.hidden}),
                                             data.y.view({data.tokens / 2, data.hidden}),
                                             data.rows.view({data.tokens / 2})};
    lemo::bench::measure(state, [&](void* stream) { residual_scatter_cuda(params, stream); });
    // Reads x[rows] and y, writes x[rows].
    state.SetBytesProcessed(state.iterations() * data.tokens / 2 * data.hidden * 3 * 2);
}
BENCHMARK(BM_ResidualScatter)->Args({65536, 4096})->UseManualTime();

void BM_GatherRows(benchmark::State& state) {
    const HalfKept data(state);
    const lemo::GatherRowsParams params{data.x.view({data.tokens, data.hidden}),
                                        data.rows.view({data.tokens / 2}),
                                        data.y.view({data.tokens / 2, data.hidden})};
    lemo::bench::measure(state, [&](void* stream) { gather_rows_cuda(params, stream); });
    state.SetBytesProcessed(state.iterations() * data.tokens / 2 * data.hidden * 2 * 2);
}
BENCHMARK(BM_GatherRows)->Args({65536, 4096})->UseManualTime();

}  // namespace
