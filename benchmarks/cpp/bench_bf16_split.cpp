#include <benchmark/benchmark.h>

#include <vector>

#include "convert.h"
#include "lemo/bf16_split.h"

namespace {

// Rows of a LoRA pair of rank 16.
void BM_Bf16Split(benchmark::State& state) {
    const int64_t rows = state.range(0), columns = state.range(1), n = rows * columns;
    std::vector<float> x(n);
    std::vector<lemo::cpu::BFloat16> y(3 * n);
    const lemo::Tensor values{x.data(), lemo::DType::kFloat32, lemo::Device::kCpu,
                              2,        {rows, columns},       {columns, 1}};
    const lemo::Tensor parts{y.data(), lemo::DType::kBFloat16, lemo::Device::kCpu,
                             3,        {rows, 3, columns},     {3 * columns, columns, 1}};
    for (auto _ : state) lemo::bf16_split_cpu({values, parts, 2.0f, true});
    state.SetBytesProcessed(state.iterations() * n * (4 + 3 * 2));
}
BENCHMARK(BM_Bf16Split)->Args({8192, 16});

}  // namespace
