#include "convert.h"
#include "lemo/rope.h"
#include "random_values.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

constexpr int64_t kHeadSize = 128;

// Half of the tokens, in blocks of 64, by the tables of all of them.
void BM_Rope(benchmark::State& state) {
    const int64_t tokens = state.range(0), heads = state.range(1), kept = tokens / 2;
    DeviceArray<BFloat16> x(kept * heads * kHeadSize), y(kept * heads * kHeadSize);
    DeviceArray<BFloat16> cos(tokens * kHeadSize), sin(tokens * kHeadSize);
    for (DeviceArray<BFloat16>* array : {&x, &cos, &sin}) array->fill_zero();
    const DeviceArray<int32_t> rows(lemo::testing::half_of_the_blocks(tokens));
    const lemo::RopeParams params{x.view({kept, heads, kHeadSize}),
                                  cos.view({tokens, kHeadSize}),
                                  sin.view({tokens, kHeadSize}),
                                  rows.view({kept}),
                                  false,
                                  y.view({kept, heads, kHeadSize})};
    lemo::bench::measure(state, [&](void* stream) { rope_cuda(params, stream); });
    state.SetBytesProcessed(state.iterations() * kept * heads * kHeadSize * 2 * 2);
}
BENCHMARK(BM_Rope)->Args({65536, 32})->Args({65536, 8})->UseManualTime();

}  // namespace
