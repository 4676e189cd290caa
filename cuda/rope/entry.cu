// rope on CUDA. One tier, which takes everything that `check` lets through.
#include "lemo/rope.h"

#include "common/launch.h"
#include "rope/portable/kernel.h"

namespace lemo {
namespace {

using namespace cuda::rope::portable;

/// The kernel with as many heads in flight as a lane has, at most 4.
template <typename T, int kWidth>
auto kernel_of(int heads, int half) {
    const int steps = ceil_div(heads, heads_at_a_time(half / kWidth));
    if (steps == 1) return rope_kernel<T, kWidth, 1>;
    return steps == 2 ? rope_kernel<T, kWidth, 2> : rope_kernel<T, kWidth, 4>;
}

}  // namespace

void rope_cuda(const RopeParams& params, void* stream) {
    if (params.x.num_elements() == 0) return;
    const RopeArguments args{cuda::FloatReader(params.cos),
                             cuda::FloatReader(params.sin),
                             params.rows ? params.rows.as<const int32_t>() : nullptr,
                             params.x.size(0),
                             static_cast<int>(params.x.size(1)),
                             static_cast<int>(params.x.size(2) / 2),
                             params.transposed};
    const unsigned grid = grid_x("rope", "x", ceil_div<int64_t>(args.num_rows, kWarpsPerBlock));
    cuda::dispatch_float(params.x.dtype, [&]<typename T>(T) {
        constexpr int kWidth = kBytes / static_cast<int>(sizeof(T));
        // Whole vectors of a half head of x make whole vectors of the tables, whatever their type.
        const bool vectorised =
            cuda::vectorisable(args.half * static_cast<int64_t>(sizeof(T)),
                               {params.x.data, params.y.data, params.cos.data, params.sin.data});
        const auto kernel = vectorised ? kernel_of<T, kWidth>(args.heads, args.half)
                                       : kernel_of<T, 1>(args.heads, args.half);
        kernel<<<grid, kWarpsPerBlock * 32, 0, static_cast<cudaStream_t>(stream)>>>(
            params.x.as<const T>(), params.y.as<T>(), args);
    });
    cuda::check_launch("rope");
}

}  // namespace lemo
