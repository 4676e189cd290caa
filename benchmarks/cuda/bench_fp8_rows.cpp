#include "convert.h"
#include "lemo/fp8_rows.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// Rows of the residual and of the MLP of an 8B model; with factors as for gradients.
void BM_Fp8Rows(benchmark::State& state) {
    const int64_t rows = state.range(0), columns = state.range(1);
    const DeviceArray<BFloat16> x(rows * columns);
    const DeviceArray<float> factors(columns), scales(rows);
    const DeviceArray<uint8_t> values(rows * columns);
    x.fill_zero();
    factors.fill_zero();
    const lemo::Fp8RowsParams params{x.view({rows, columns}),
                                     state.range(2) ? factors.view({columns}) : lemo::Tensor{},
                                     scales.view({rows, 1}), values.data()};
    lemo::bench::measure(state, [&](void* stream) { fp8_rows_cuda(params, stream); });
    state.SetBytesProcessed(state.iterations() * rows * columns * 3);
}
BENCHMARK(BM_Fp8Rows)
    ->Args({32768, 4096, 0})
    ->Args({32768, 4096, 1})
    ->Args({32768, 14336, 0})
    ->Args({32768, 14336, 1})
    ->UseManualTime();

void BM_Fp8Transpose(benchmark::State& state) {
    const int64_t rows = state.range(0), columns = state.range(1);
    const DeviceArray<uint8_t> x(rows * columns), y(rows * columns);
    x.fill_zero();
    const lemo::Fp8TransposeParams params{x.data(), y.data(), rows, columns};
    lemo::bench::measure(state, [&](void* stream) { fp8_transpose_cuda(params, stream); });
    state.SetBytesProcessed(state.iterations() * rows * columns * 2);
}
BENCHMARK(BM_Fp8Transpose)->Args({14336, 4096})->UseManualTime();

}  // namespace
