// residual_scatter and gather_rows on CUDA. One tier, which takes everything that `check` lets
// through.
#include "lemo/residual_scatter.h"

#include <algorithm>

#include "common/launch.h"
#include "residual_scatter/portable/kernel.h"

namespace lemo {
namespace {

using namespace cuda::residual_scatter::portable;

template <typename Residual, typename Packed, bool kScatter>
void launch(const Tensor& residual, const Tensor& packed, const Tensor& rows, const char* op,
            void* stream) {
    const int64_t num_rows = packed.size(0);
    if (num_rows == 0 || packed.size(1) == 0) return;
    // Both rows are walked in steps of the wider type's 16 bytes, 8 of the narrower one's.
    const int64_t row_bytes = packed.size(1) * std::min(sizeof(Residual), sizeof(Packed)) *
                              (sizeof(Residual) == sizeof(Packed) ? 1 : 2);
    const bool vectorised = cuda::vectorisable(row_bytes, {residual.data, packed.data});
    const unsigned grid = grid_x(op, "y", ceil_div<int64_t>(num_rows, kWarpsPerBlock));
    residual_rows_kernel<Residual, Packed, kScatter>
        <<<grid, kWarpsPerBlock * 32, 0, static_cast<cudaStream_t>(stream)>>>(
            residual.as<Residual>(), packed.as<Packed>(), rows ? rows.as<const int32_t>() : nullptr,
            num_rows, residual.size(1), vectorised);
    cuda::check_launch(op);
}

}  // namespace

void residual_scatter_cuda(const ResidualScatterParams& params, void* stream) {
    cuda::dispatch_float(params.x.dtype, [&]<typename X>(X) {
        cuda::dispatch_float(params.y.dtype, [&]<typename Y>(Y) {
            launch<X, Y, true>(params.x, params.y, params.rows, "residual_scatter", stream);
        });
    });
}

void gather_rows_cuda(const GatherRowsParams& params, void* stream) {
    cuda::dispatch_float(params.x.dtype, [&]<typename T>(T) {
        launch<T, T, false>(params.x, params.y, params.rows, "gather_rows", stream);
    });
}

}  // namespace lemo
