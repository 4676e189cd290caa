// select_norm on CUDA. One tier, which takes everything that `check` lets through.
#include "lemo/select_norm.h"

#include "common/launch.h"
#include "select_norm/portable/kernel.h"

namespace lemo {
namespace {

using namespace cuda::select_norm::portable;

constexpr char kLayer[] = "layer";

/// Bytes of shared memory for a row of each group of threads of a block.
template <typename T, int kRowThreads>
size_t shared_rows(int64_t hidden) {
    const int64_t elements = kBlockRows<kRowThreads> * cuda::round_up(hidden, kElements<T>);
    return static_cast<size_t>(elements) * sizeof(T);
}

/// Calls `body(T{}, Int<kRowThreads>{})` with the storage type and the threads that a row gets: a
/// warp where its lanes can load the whole row at once, else a thread block.
template <typename Body>
void dispatch_row(DType dtype, int64_t hidden, bool vectorised, Body&& body) {
    cuda::dispatch_float(dtype, [&]<typename T>(T) {
        if (vectorised && hidden <= kWarp * kInFlight * kElements<T>) {
            body(T{}, cuda::Int<kWarp>{});
        } else {
            body(T{}, cuda::Int<kThreads>{});
        }
    });
}

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
                             num_rows,
                             hidden,
                             vectorised,
                             params.kind == kLayer ? params.mean.as<float>() : nullptr,
                             params.rstd.as<float>()};
    dispatch_row(params.x.dtype, hidden, vectorised, [&]<typename T, int kRow>(T, cuda::Int<kRow>) {
        const size_t shared_bytes = shared_rows<T, kRow>(hidden);
        const unsigned grid = grid_x("select_norm", params.rows ? "rows" : "x",
                                     ceil_div<int64_t>(num_rows, kBlockRows<kRow>));
        const auto kernel = select_norm_kernel<T, kRow>;
        cuda::reserve_shared_memory("select_norm", kernel, shared_bytes);
        kernel<<<grid, kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
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
        num_rows,
        hidden,
        vectorised,
        params.kind == kLayer ? params.mean.as<const float>() : nullptr,
        params.rstd.as<const float>()};
    dispatch_row(
        params.dx.dtype, hidden, vectorised, [&]<typename T, int kRow>(T, cuda::Int<kRow>) {
            const T* dy = params.dy.as<const T>();
            const T* x_rows = params.x_rows.as<const T>();
            if (num_rows > 0) {
                const size_t shared_bytes = 2 * shared_rows<T, kRow>(hidden);
                const unsigned grid = grid_x("select_norm_backward", "dy",
                                             ceil_div<int64_t>(num_rows, kBlockRows<kRow>));
                const auto kernel = select_norm_backward_kernel<T, kRow>;
                cuda::reserve_shared_memory("select_norm_backward", kernel, shared_bytes);
                kernel<<<grid, kThreads, shared_bytes, cuda_stream>>>(dy, x_rows, params.dx.as<T>(),
                                                                      args);
                cuda::check_launch("select_norm_backward");
            }
            if (!params.dweight && !params.dbias) return;
            const auto grid = static_cast<unsigned>(ceil_div<int64_t>(hidden, kGradColumns));
            norm_weight_grad_kernel<T><<<grid, kGradColumns * kGradRows, 0, cuda_stream>>>(
                dy, x_rows, args, params.dweight ? params.dweight.as<float>() : nullptr,
                params.dbias ? params.dbias.as<float>() : nullptr);
            cuda::check_launch("select_norm_backward");
        });
}

}  // namespace lemo
