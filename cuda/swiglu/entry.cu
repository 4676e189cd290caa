// swiglu on CUDA. One tier, which takes everything that `check` lets through.
#include "lemo/swiglu.h"

#include "common/launch.h"
#include "swiglu/portable/kernel.h"

namespace lemo {

using namespace cuda::swiglu::portable;

void swiglu_cuda(const SwigluParams& params, void* stream) {
    const int64_t n = params.gate.num_elements();
    if (n == 0) return;
    cuda::dispatch_float(params.gate.dtype, [&]<typename T>(T) {
        constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
        const bool aligned =
            cuda::vectorisable(0, {params.gate.data, params.up.data, params.y.data});
        const auto kernel = aligned ? swiglu_kernel<T, kWidth> : swiglu_kernel<T, 1>;
        kernel<<<grid_of("swiglu", n, aligned ? kWidth : 1), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(params.gate.as<const T>(),
                                                      params.up.as<const T>(), params.y.as<T>(), n);
    });
    cuda::check_launch("swiglu");
}

void swiglu_fp8_cuda(const SwigluFp8Params& params, void* stream) {
    const auto& [gate, up, y] = params.product;
    const int64_t rows = gate.size(0), columns = gate.size(1);
    if (rows == 0) return;
    const unsigned grid = grid_x("swiglu_fp8", "gate", rows);
    cuda::dispatch_float(gate.dtype, [&]<typename T>(T) {
        constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
        const int64_t vectors = columns / kWidth;
        const bool held = vectors <= int64_t{kMostVectors} * kRowThreads &&
                          cuda::vectorisable(columns * static_cast<int64_t>(sizeof(T)),
                                             {gate.data, up.data, y.data, params.values});
        const auto kernel = !held                        ? swiglu_any_rows_kernel<T>
                            : vectors <= 2 * kRowThreads ? swiglu_rows_kernel<T, 2>
                            : vectors <= 4 * kRowThreads ? swiglu_rows_kernel<T, 4>
                                                         : swiglu_rows_kernel<T, kMostVectors>;
        kernel<<<grid, kRowThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            gate.as<const T>(), up.as<const T>(), y.as<T>(), params.values,
            params.scales.as<float>(), columns);
    });
    cuda::check_launch("swiglu_fp8");
}

void swiglu_backward_cuda(const SwigluBackwardParams& params, void* stream) {
    const int64_t n = params.gate.num_elements();
    if (n == 0) return;
    cuda::dispatch_float(params.gate.dtype, [&]<typename T>(T) {
        constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
        const bool aligned =
            cuda::vectorisable(0, {params.dout.data, params.gate.data, params.up.data});
        const auto kernel =
            aligned ? swiglu_backward_kernel<T, kWidth> : swiglu_backward_kernel<T, 1>;
        kernel<<<grid_of("swiglu_backward", n, aligned ? kWidth : 1), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(params.dout.as<const T>(),
                                                      params.gate.as<T>(), params.up.as<T>(), n);
    });
    cuda::check_launch("swiglu_backward");
}

}  // namespace lemo
