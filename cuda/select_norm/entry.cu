// select_norm on CUDA. One tier, which takes everything that `check` lets through.
#include "lemo/select_norm.h"

#include "common/launch.h"
#include "select_norm/portable/kernel.h"

namespace lemo {
namespace {

using namespace cuda::select_norm::portable;

constexpr char kLayer[] = "layer";

}  // namespace

void select_norm_cuda(const SelectNormParams& params, void* stream) {
    const int64_t num_rows = params.y.size(0), hidden = params.x.size(1);
    if (num_rows == 0) return;
    const int64_t row_bytes = hidden * size_of(params.x.dtype);
    const bool vectorised = cuda::vectorisable(
        row_bytes, {params.x.data, params.y.data, params.x_rows ? params.x_rows.data : nullptr,
                    params.weight.data, params.bias ? params.bias.data : nullptr});
    const NormArguments args{params.rows ? params.rows.as<const int32_t>() : nullptr,
                             cuda::FloatReader(params.weight),
                             cuda::FloatReader(params.bias),
                             static_cast<float>(params.eps),
                             hidden,
                             vectorised,
                             params.kind == kLayer ? params.mean.as<float>() : nullptr,
                             params.rstd.as<float>()};
    const unsigned grid = grid_x("select_norm", params.rows ? "rows" : "x", num_rows);
    cuda::dispatch_float(params.x.dtype, [&]<typename T>(T) {
        const size_t shared_bytes = static_cast<size_t>(hidden) * sizeof(T);
        cuda::reserve_shared_memory("select_norm", select_norm_kernel<T>, shared_bytes);
        select_norm_kernel<T><<<grid, kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
            params.x.as<const T>(), params.y.as<T>(),
            params.x_rows ? params.x_rows.as<T>() : nullptr, args);
    });
    cuda::check_launch("select_norm");
}

void select_norm_backward_cuda(const SelectNormBackwardParams& params, void* stream) {
    const int64_t num_rows = params.dy.size(0), hidden = params.dx.size(1);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const bool vectorised = cuda::vectorisable(
        hidden * size_of(params.dx.dtype),
        {params.dy.data, params.x_rows.data, params.dx.data, params.weight.data});
    const NormBackwardArguments args{
        params.rows ? params.rows.as<const int32_t>() : nullptr,
        cuda::FloatReader(params.weight),
        hidden,
        vectorised,
        params.kind == kLayer ? params.mean.as<const float>() : nullptr,
        params.rstd.as<const float>()};
    cuda::dispatch_float(params.dx.dtype, [&]<typename T>(T) {
        const T* dy = params.dy.as<const T>();
        const T* x_rows = params.x_rows.as<const T>();
        if (num_rows > 0) {
            const size_t shared_bytes =
                2 * static_cast<size_t>(cuda::round_up(hidden, kElements<T>)) * sizeof(T);
            cuda::reserve_shared_memory("select_norm_backward", select_norm_backward_kernel<T>,
                                        shared_bytes);
            select_norm_backward_kernel<T>
                <<<grid_x("select_norm_backward", "dy", num_rows), kThreads, shared_bytes,
                   cuda_stream>>>(dy, x_rows, params.dx.as<T>(), args);
            cuda::check_launch("select_norm_backward");
        }
        if (!params.dweight && !params.dbias) return;
        const auto grid = static_cast<unsigned>(ceil_div<int64_t>(hidden, kGradColumns));
        norm_weight_grad_kernel<T><<<grid, kGradColumns * kGradRows, 0, cuda_stream>>>(
            dy, x_rows, num_rows, args, params.dweight ? params.dweight.as<float>() : nullptr,
            params.dbias ? params.dbias.as<float>() : nullptr);
        cuda::check_launch("select_norm_backward");
    });
}

}  // namespace lemo
