#include "convert.h"
#include "lemo/bf16_split.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// What a product has given for rows of a LoRA pair, and a pair's weight.
void BM_Bf16Split(benchmark::State& state) {
    const int64_t rows = state.range(0), columns = state.range(1), n = rows * columns;
    const DeviceArray<float> x(3 * n);
    const DeviceArray<BFloat16> y(3 * n);
    x.fill_zero();
    const lemo::Bf16SplitParams params{x.view({rows, 3, columns}), y.view({rows, 3, columns}), 2,
                                       true};
    lemo::bench::measure(state, [&](void* stream) { bf16_split_cuda(params, stream); });
    state.SetBytesProcessed(state.iterations() * n * (2 * 4 + 3 * 2));
}
BENCHMARK(BM_Bf16Split)->Args({16384, 16})->Args({16384, 64})->UseManualTime();

}  // namespace
