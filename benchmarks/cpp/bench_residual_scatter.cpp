#include <benchmark/benchmark.h>

#include <numeric>
#include <vector>

#include "convert.h"
#include "lemo/residual_scatter.h"

namespace {

lemo::Tensor matrix(std::vector<lemo::cpu::BFloat16>& values, int64_t rows, int64_t columns) {
    return {values.data(), lemo::DType::kBFloat16, lemo::Device::kCpu, 2, {rows, columns},
            {columns, 1}};
}

// Half of the tokens, in blocks of 64: the shape of a layer at keep 0.5.
void BM_ResidualScatter(benchmark::State& state) {
    const int64_t tokens = state.range(0), hidden = state.range(1);
    std::vector<lemo::cpu::BFloat16> x(static_cast<size_t>(tokens * hidden));
    std::vector<lemo::cpu::BFloat16> y(static_cast<size_t>(tokens / 2 * hidden));
    std::vector<int32_t> rows(static_cast<size_t>(tokens / 2));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i / 64 * 128 + i % 64);
    const lemo::Tensor index{rows.data(), lemo::DType::kInt32, lemo::Device::kCpu,
                             1,           {tokens / 2},        {1}};
    const lemo::ResidualScatterParams params{matrix(x, tokens, hidden),
                                             matrix(y, tokens / 2, hidden), index};
    for (auto _ : state) lemo::residual_scatter_cpu(params);
    state.SetBytesProcessed(state.iterations() * tokens / 2 * hidden * 3 * 2);
}
BENCHMARK(BM_ResidualScatter)->Args({8192, 384})->Args({8192, 4096});

}  // namespace
