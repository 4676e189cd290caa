#include <benchmark/benchmark.h>

#include <vector>

#include "convert.h"
#include "lemo/select_norm.h"

namespace {

using lemo::cpu::BFloat16;

// Half of the tokens, in blocks of 64: the shape of a layer at keep 0.5.
template <typename T>
struct HalfKept {
    HalfKept(int64_t tokens, int64_t hidden)
        : tokens(tokens), hidden(hidden), x(tokens * hidden), y(tokens / 2 * hidden), x_rows(y),
          weight(hidden, 1.0f), dweight(hidden), rstd(tokens / 2, 1.0f), rows(tokens / 2) {
        for (size_t i = 0; i < rows.size(); ++i) {
            rows[i] = static_cast<int32_t>(i / 64 * 128 + i % 64);
        }
    }

    lemo::Tensor matrix(std::vector<T>& values) const {
        const auto dtype = sizeof(T) == 4 ? lemo::DType::kFloat32 : lemo::DType::kBFloat16;
        const int64_t num_rows = static_cast<int64_t>(values.size()) / hidden;
        return {values.data(), dtype, lemo::Device::kCpu, 2, {num_rows, hidden}, {hidden, 1}};
    }

    template <typename Value>
    static lemo::Tensor line(std::vector<Value>& values, lemo::DType dtype) {
        const int64_t size = static_cast<int64_t>(values.size());
        return {values.data(), dtype, lemo::Device::kCpu, 1, {size}, {1}};
    }

    lemo::SelectNormParams forward() {
        const auto fp32 = lemo::DType::kFloat32;
        return {matrix(x),
                line(rows, lemo::DType::kInt32),
                line(weight, fp32),
                {},
                1e-6,
                "rms",
                matrix(y),
                matrix(x_rows),
                line(mean, fp32),
                line(rstd, fp32)};
    }

    lemo::SelectNormBackwardParams backward(bool weight_grad) {
        const auto fp32 = lemo::DType::kFloat32;
        return {matrix(y),
                matrix(x_rows),
                line(rows, lemo::DType::kInt32),
                line(weight, fp32),
                line(mean, fp32),
                line(rstd, fp32),
                "rms",
                matrix(x),
                weight_grad ? line(dweight, fp32) : lemo::Tensor{},
                {}};
    }

    int64_t tokens, hidden;
    std::vector<T> x, y, x_rows;
    std::vector<float> weight, dweight, mean, rstd;
    std::vector<int32_t> rows;
};

template <typename T>
void BM_SelectNorm(benchmark::State& state) {
    HalfKept<T> data(state.range(0), state.range(1));
    const lemo::SelectNormParams params = data.forward();
    for (auto _ : state) lemo::select_norm_cpu(params);
    // Reads x[rows], writes y and the copy of x[rows].
    state.SetBytesProcessed(state.iterations() * params.y.num_elements() * 3 * sizeof(T));
}
BENCHMARK(BM_SelectNorm<float>)->Args({8192, 384})->Args({8192, 4096});
BENCHMARK(BM_SelectNorm<BFloat16>)->Args({8192, 384})->Args({8192, 4096});

template <typename T>
void BM_SelectNormBackward(benchmark::State& state) {
    HalfKept<T> data(state.range(0), state.range(1));
    const lemo::SelectNormBackwardParams params = data.backward(state.range(2) != 0);
    for (auto _ : state) lemo::select_norm_backward_cpu(params);
    // Reads dy, x[rows] and dx[rows], writes dx[rows].
    state.SetBytesProcessed(state.iterations() * params.dy.num_elements() * 4 * sizeof(T));
}
BENCHMARK(BM_SelectNormBackward<float>)->Args({8192, 384, 0})->Args({8192, 384, 1});
BENCHMARK(BM_SelectNormBackward<BFloat16>)->Args({8192, 384, 0})->Args({8192, 384, 1});

}  // namespace
