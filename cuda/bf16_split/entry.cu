// bf16_split on CUDA. One tier, which takes everything that `check` lets through.
#include "lemo/bf16_split.h"

#include "bf16_split/portable/kernel.h"
#include "common/launch.h"

namespace lemo {

using namespace cuda::bf16_split::portable;

void bf16_split_cuda(const Bf16SplitParams& params, void* stream) {
    const int64_t rows = params.y.size(0), columns = params.y.size(2);
    if (rows == 0 || columns == 0) return;
    constexpr int kWidth = 4;  // 16 bytes of x, 8 of y
    const bool by_blocks = params.x.ndim == 3;
    const bool aligned = cuda::vectorisable(columns * static_cast<int64_t>(sizeof(float)),
                                            {params.x.data, params.y.data});
    const auto kernel = aligned
                            ? (by_blocks ? split_kernel<kWidth, true> : split_kernel<kWidth, false>)
                            : (by_blocks ? split_kernel<1, true> : split_kernel<1, false>);
    const int64_t vectors = rows * columns / (aligned ? kWidth : 1);
    const unsigned grid = grid_x("bf16_split", "x", ceil_div<int64_t>(vectors, kThreads));
    kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        params.x.as<const float>(), params.y.as<cutlass::bfloat16_t>(), rows, columns, params.scale,
        params.left);
    cuda::check_launch("bf16_split");
}

void bf16_split_all_cuda(const Bf16SplitAllParams& params, void* stream) {
    constexpr int kWidth = 4;
    cutlass::bfloat16_t* y = params.y.as<cutlass::bfloat16_t>();
    bool aligned = cuda::vectorisable(0, {y});
    for (const Tensor& x : params.xs) {
        const int64_t row_bytes = x.size(1) * static_cast<int64_t>(sizeof(float));
        aligned = aligned && cuda::vectorisable(row_bytes, {x.data});
    }
    const auto kernel = aligned ? split_all_kernel<kWidth> : split_all_kernel<1>;

    Matrices matrices{};
    int count = 0;
    const auto launch = [&] {
        if (count == 0) return;
        const int64_t vectors = matrices.ends[count - 1];
        const unsigned grid = grid_x("bf16_split_all", "xs", ceil_div<int64_t>(vectors, kThreads));
        kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(matrices, count);
        cuda::check_launch("bf16_split_all");
        count = 0;
    };
    for (const Tensor& x : params.xs) {
        const int64_t elements = x.num_elements();
        if (elements == 0) continue;
        const int64_t before = count == 0 ? 0 : matrices.ends[count - 1];
        matrices.x[count] = x.as<const float>();
        matrices.y[count] = y;
        matrices.columns[count] = x.size(1);
        matrices.ends[count] = before + elements / (aligned ? kWidth : 1);
        y += 3 * elements;
        if (++count == Matrices::kMost) launch();
    }
    launch();
}

}  // namespace lemo
