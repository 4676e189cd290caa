#include "convert.h"
#include "lemo/rope.h"
#include "random_values.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// Half of the tokens, in blocks of 64, by the tables of all of them.
void BM_Rope(benchmark::State& state) {
    const int64_t tokens = state.range(0), heads = state.range(1), head_size = state.range(2);
    const int64_t kept = tokens / 2;
    DeviceArray<BFloat16> x(kept * heads * head_size), y(kept * heads * head_size);
    DeviceArray<BFloat16> cos(tokens * head_size), sin(tokens * head_size);
    for (DeviceArray<BFloat16>* array : {&x, &cos, &sin}) array->fill_zero();
    const DeviceArray<int32_t> rows(lemo::testing::half_of_the_blocks(tokens));
    const lemo::RopeParams params{x.view({kept, heads, head_size}),
                                  cos.view({tokens, head_size}),
                                  sin.view({tokens, head_size}),
                                  rows.view({kept}),
                                  false,
                                  y.view({kept, heads, head_size})};
    lemo::bench::measure(state, [&](void* stream) { rope_cuda(params, stream); });
    state.SetBytesProcessed(state.iterations() * kept * heads * head_size * 2 * 2);
}
BENCHMARK(BM_Rope)
    ->Args({65536, 32, 128})
    ->Args({65536, 8, 128})
    ->Args({32768, 9, 64})
    ->Args({32768, 3, 64})
    ->UseManualTime();

}  // namespace
