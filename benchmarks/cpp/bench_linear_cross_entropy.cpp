#include <benchmark/benchmark.h>

#include <vector>

#include "convert.h"
#include "lemo/blocks.h"
#include "lemo/linear_cross_entropy.h"

namespace {

using lemo::cpu::BFloat16;

std::vector<BFloat16> fill(int64_t size) {
    std::vector<BFloat16> values(static_cast<size_t>(size));
    for (size_t i = 0; i < values.size(); ++i) {
        lemo::cpu::store(&values[i], static_cast<float>(i * 2654435761u % 1000) / 2000.0f - 0.25f);
    }
    return values;
}

lemo::Tensor matrix(std::vector<BFloat16>& values, int64_t rows, int64_t columns) {
    return {values.data(), lemo::DType::kBFloat16, lemo::Device::kCpu, 2, {rows, columns},
            {columns, 1}};
}

// The loss of the main job's model, weights frozen: loss and gradient of the hidden states.
void BM_LinearCrossEntropy(benchmark::State& state) {
    const int64_t rows = state.range(0), size = state.range(1), vocabulary = state.range(2);
    auto hidden = fill(rows * size), weight = fill(vocabulary * size), dhidden = hidden;
    std::vector<int64_t> labels(static_cast<size_t>(rows));
    for (size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<int64_t>(i) % vocabulary;
    float loss = 0;
    int64_t count = 0;
    lemo::LinearCrossEntropyParams params;
    params.hidden = matrix(hidden, rows, size);
    params.weight = matrix(weight, vocabulary, size);
    params.dhidden = matrix(dhidden, rows, size);
    params.labels = {labels.data(), lemo::DType::kInt64, lemo::Device::kCpu, 1, {rows}, {1}};
    params.loss = {&loss, lemo::DType::kFloat32, lemo::Device::kCpu, 0, {}, {}};
    params.count = {&count, lemo::DType::kInt64, lemo::Device::kCpu, 0, {}, {}};
    params.chunk_rows = lemo::plan_loss_chunk(rows, vocabulary, int64_t{256} << 20);
    for (auto _ : state) lemo::linear_cross_entropy_cpu(params);
    state.counters["FLOP/s"] =
        benchmark::Counter(4.0 * static_cast<double>(rows * size * vocabulary),
                           benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(BM_LinearCrossEntropy)->Args({8192, 384, 16384})->UseRealTime();

}  // namespace
