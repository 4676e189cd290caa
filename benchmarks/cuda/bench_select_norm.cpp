#include "convert.h"
#include "lemo/select_norm.h"
#include "random_values.h"
#include "timing.h"

namespace {

using lemo::Tensor;
using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// Half of the tokens, in blocks of 64: the shape of a layer at keep 0.5.
struct HalfKept {
    explicit HalfKept(const benchmark::State& state)
        : tokens(state.range(0)), kept(tokens / 2), hidden(state.range(1)), x(tokens * hidden),
          y(kept * hidden), x_rows(kept * hidden), weight(hidden), dweight(hidden), mean(0),
          rstd(std::vector<float>(kept, 1.0f)), rows(lemo::testing::half_of_the_blocks(tokens)) {
        for (const auto* array : {&x, &y, &x_rows, &weight}) array->fill_zero();
    }

    int64_t tokens, kept, hidden;
    DeviceArray<BFloat16> x, y, x_rows, weight;
    DeviceArray<float> dweight, mean, rstd;
    DeviceArray<int32_t> rows;
};

void BM_SelectNorm(benchmark::State& state) {
    const HalfKept data(state);
    const lemo::SelectNormParams params{data.x.view({data.tokens, data.hidden}),
                                        data.rows.view({data.kept}),
                                        data.weight.view({data.hidden}),
                                        Tensor{},
                                        1e-5,
                                        "rms",
                                        data.y.view({data.kept, data.hidden}),
                                        data.x_rows.view({data.kept, data.hidden}),
                                        data.mean.view({0}),
                                        data.rstd.view({data.kept})};
    lemo::bench::measure(state, [&](void* stream) { select_norm_cuda(params, stream); });
    // Reads x[rows], writes y and the copy of x[rows].
    state.SetBytesProcessed(state.iterations() * data.kept * data.hidden * 3 * 2);
}
BENCHMARK(BM_SelectNorm)
    ->Args({65536, 4096})
    ->Args({32768, 1024})
    ->Args({32768, 576})
    ->Args({32768, 384})
    ->UseManualTime();

void BM_SelectNormBackward(benchmark::State& state) {
    const HalfKept data(state);
    const bool weight_grad = state.range(2) != 0;
    const lemo::SelectNormBackwardParams params{
        data.y.view({data.kept, data.hidden}),
        data.x_rows.view({data.kept, data.hidden}),
        data.rows.view({data.kept}),
        data.weight.view({data.hidden}),
        data.mean.view({0}),
        data.rstd.view({data.kept}),
        "rms",
        data.x.view({data.tokens, data.hidden}),
        weight_grad ? data.dweight.view({data.hidden}) : Tensor{},
        Tensor{}};
    lemo::bench::measure(state, [&](void* stream) { select_norm_backward_cuda(params, stream); });
    // Reads dy, x[rows] and dx[rows], writes dx[rows]; the weight's gradient reads dy and x[rows].
    state.SetBytesProcessed(state.iterations() * data.kept * data.hidden * (weight_grad ? 6 : 4) *
                            2);
}
BENCHMARK(BM_SelectNormBackward)
    ->Args({65536, 4096, 0})
    ->Args({65536, 4096, 1})
    ->Args({32768, 1024, 0})
    ->Args({32768, 576, 0})
    ->Args({32768, 384, 0})
    ->UseManualTime();

}  // namespace
