// fp8_rows on CUDA. One tier, which takes everything that `check` lets through.
#include "lemo/fp8_rows.h"

#include "common/launch.h"
#include "fp8_rows/portable/kernel.h"

namespace lemo {
namespace {

using namespace cuda::fp8_rows::portable;

/// The kernel that holds rows of so many vectors.
template <typename T, bool kScaled>
auto held_kernel(int64_t vectors) {
    if (vectors <= kThreads) return held_rows_kernel<T, 1, kScaled>;
    if (vectors <= 2 * kThreads) return held_rows_kernel<T, 2, kScaled>;
    if (vectors <= 4 * kThreads) return held_rows_kernel<T, 4, kScaled>;
    return held_rows_kernel<T, kMostVectors, kScaled>;
}

}  // namespace

void fp8_rows_cuda(const Fp8RowsParams& params, void* stream) {
    const int64_t rows = params.x.size(0), columns = params.x.size(1);
    if (rows == 0) return;
    const float* factors = params.columns ? params.columns.as<const float>() : nullptr;
    const unsigned grid = grid_x("fp8_rows", "x", rows);
    cuda::dispatch_float(params.x.dtype, [&]<typename T>(T) {
        const int64_t vectors = columns / kElements<T>;
        const bool held = vectors <= int64_t{kMostVectors} * kThreads &&
                          cuda::vectorisable(columns * static_cast<int64_t>(sizeof(T)),
                                             {params.x.data, params.values, factors});
        const auto kernel = !held     ? any_rows_kernel<T>
                            : factors ? held_kernel<T, true>(vectors)
                                      : held_kernel<T, false>(vectors);
        kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            params.x.as<const T>(), factors, params.values, params.scales.as<float>(), columns);
    });
    cuda::check_launch("fp8_rows");
}

void fp8_transpose_cuda(const Fp8TransposeParams& params, void* stream) {
    const int64_t rows = params.rows, columns = params.columns;
    if (rows == 0 || columns == 0) return;
    const int64_t column_tiles = ceil_div<int64_t>(columns, kTile);
    const unsigned grid =
        grid_x("fp8_transpose", "x", column_tiles * ceil_div<int64_t>(rows, kTile));
    transpose_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        params.x, params.y, rows, columns, static_cast<unsigned>(column_tiles));
    cuda::check_launch("fp8_transpose");
}

}  // namespace lemo
