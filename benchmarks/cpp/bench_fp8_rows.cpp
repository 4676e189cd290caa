#include <benchmark/benchmark.h>

#include <vector>

#include "convert.h"
#include "lemo/fp8_rows.h"

namespace {

template <typename T>
void BM_Fp8Rows(benchmark::State& state) {
    const int64_t rows = state.range(0), columns = state.range(1), n = rows * columns;
    std::vector<T> x(n);
    std::vector<float> scales(rows);
    std::vector<uint8_t> values(n);
    const auto dtype = sizeof(T) == 4 ? lemo::DType::kFloat32 : lemo::DType::kBFloat16;
    const lemo::Fp8RowsParams params{
        {x.data(), dtype, lemo::Device::kCpu, 2, {rows, columns}, {columns, 1}},
        {},
        {scales.data(), lemo::DType::kFloat32, lemo::Device::kCpu, 2, {rows, 1}, {1, 1}},
        values.data()};
    for (auto _ : state) lemo::fp8_rows_cpu(params);
    state.SetBytesProcessed(state.iterations() * n * static_cast<int64_t>(sizeof(T) + 1));
}
BENCHMARK(BM_Fp8Rows<float>)->Args({2048, 1024});
BENCHMARK(BM_Fp8Rows<lemo::cpu::BFloat16>)->Args({2048, 1024});

void BM_Fp8Transpose(benchmark::State& state) {
    const int64_t rows = state.range(0), columns = state.range(1);
    std::vector<uint8_t> x(rows * columns), y(rows * columns);
    const lemo::Fp8TransposeParams params{x.data(), y.data(), rows, columns};
    for (auto _ : state) lemo::fp8_transpose_cpu(params);
    state.SetBytesProcessed(state.iterations() * rows * columns * 2);
}
BENCHMARK(BM_Fp8Transpose)->Args({2048, 1024});

}  // namespace
