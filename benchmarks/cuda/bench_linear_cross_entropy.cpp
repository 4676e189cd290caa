#include "convert.h"
#include "lemo/linear_cross_entropy.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// The loss of a Llama-3 head, weights frozen, in segments of 2048 rows. Zeros: the products' clocks
// and times are better than those of real values; benchmarks/gpu has the figures that count.
void BM_LinearCrossEntropy(benchmark::State& state) {
    const int64_t rows = state.range(0), size = state.range(1), vocabulary = state.range(2);
    const bool gradient = state.range(3) != 0;
    const DeviceArray<BFloat16> hidden(rows * size), weight(vocabulary * size);
    const DeviceArray<BFloat16> dhidden(gradient ? rows * size : 0);
    const DeviceArray<int64_t> labels(rows), count(1);
    const DeviceArray<float> loss(1);
    hidden.fill_zero();
    weight.fill_zero();
    labels.fill_zero();
    lemo::LinearCrossEntropyParams params;
    params.hidden = hidden.view({rows, size});
    params.weight = weight.view({vocabulary, size});
    params.labels = labels.view({rows});
    params.chunk_rows = 2048;
    params.loss = loss.view({});
    params.count = count.view({});
    if (gradient) params.dhidden = dhidden.view({rows, size});
    const lemo::testing::Scratch scratch(linear_cross_entropy_scratch_bytes(params));
    params.scratch = scratch.data();
    lemo::bench::measure(state, [&](void* stream) { linear_cross_entropy_cuda(params, stream); });
    state.counters["FLOP/s"] =
        benchmark::Counter((gradient ? 4.0 : 2.0) * static_cast<double>(rows * size * vocabulary),
                           benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(BM_LinearCrossEntropy)
    ->Args({16384, 4096, 128256, 1})
    ->Args({16384, 4096, 128256, 0})
    ->Args({16384, 4096, 32000, 1})
    ->UseManualTime();

}  // namespace
