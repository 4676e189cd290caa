#include <benchmark/benchmark.h>

#include <vector>

#include "convert.h"
#include "lemo/swiglu.h"

namespace {

template <typename T>
lemo::Tensor matrix(std::vector<T>& values, int64_t rows) {
    const int64_t columns = static_cast<int64_t>(values.size()) / rows;
    const auto dtype = sizeof(T) == 4 ? lemo::DType::kFloat32 : lemo::DType::kBFloat16;
    return {values.data(), dtype, lemo::Device::kCpu, 2, {rows, columns}, {columns, 1}};
}

template <typename T>
void BM_Swiglu(benchmark::State& state) {
    const int64_t rows = state.range(0), n = rows * state.range(1);
    std::vector<T> gate(n), up(n), y(n);
    const lemo::SwigluParams params{matrix(gate, rows), matrix(up, rows), matrix(y, rows)};
    for (auto _ : state) lemo::swiglu_cpu(params);
    state.SetBytesProcessed(state.iterations() * n * 3 * static_cast<int64_t>(sizeof(T)));
}
BENCHMARK(BM_Swiglu<float>)->Args({2048, 1024});
BENCHMARK(BM_Swiglu<lemo::cpu::BFloat16>)->Args({2048, 1024});

template <typename T>
void BM_SwigluBackward(benchmark::State& state) {
    const int64_t rows = state.range(0), n = rows * state.range(1);
    std::vector<T> dout(n), gate(n), up(n);
    const lemo::SwigluBackwardParams params{matrix(dout, rows), matrix(gate, rows),
                                            matrix(up, rows)};
    for (auto _ : state) lemo::swiglu_backward_cpu(params);
    state.SetBytesProcessed(state.iterations() * n * 5 * static_cast<int64_t>(sizeof(T)));
}
BENCHMARK(BM_SwigluBackward<float>)->Args({2048, 1024});
BENCHMARK(BM_SwigluBackward<lemo::cpu::BFloat16>)->Args({2048, 1024});

}  // namespace
