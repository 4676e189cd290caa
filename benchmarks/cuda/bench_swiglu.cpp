#include "convert.h"
#include "lemo/swiglu.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// The MLP of an 8B model at half of 64K tokens.
struct Gates {
    explicit Gates(const benchmark::State& state)
        : rows(state.range(0)), columns(state.range(1)), gate(rows * columns), up(rows * columns),
          other(rows * columns) {
        gate.fill_zero();
        up.fill_zero();
        other.fill_zero();
    }

    int64_t rows, columns;
    DeviceArray<BFloat16> gate, up, other;
};

void BM_Swiglu(benchmark::State& state) {
    const Gates data(state);
    const lemo::SwigluParams params{data.gate.view({data.rows, data.columns}),
                                    data.up.view({data.rows, data.columns}),
                                    data.other.view({data.rows, data.columns})};
    lemo::bench::measure(state, [&](void* stream) { swiglu_cuda(params, stream); });
    state.SetBytesProcessed(state.iterations() * data.rows * data.columns * 3 * 2);
}
BENCHMARK(BM_Swiglu)->Args({32768, 14336})->UseManualTime();

void BM_SwigluBackward(benchmark::State& state) {
    const Gates data(state);
    const lemo::SwigluBackwardParams params{data.other.view({data.rows, data.columns}),
                                            data.gate.view({data.rows, data.columns}),
                                            data.up.view({data.rows, data.columns})};
    lemo::bench::measure(state, [&](void* stream) { swiglu_backward_cuda(params, stream); });
    // Reads three, writes two.
    state.SetBytesProcessed(state.iterations() * data.rows * data.columns * 5 * 2);
}
BENCHMARK(BM_SwigluBackward)->Args({32768, 14336})->UseManualTime();

}  // namespace
