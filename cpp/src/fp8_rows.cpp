#include "lemo/fp8_rows.h"

#include <algorithm>

#include "convert.h"
#include "fp8.h"
#include "lemo/check.h"
#include "parallel.h"

namespace lemo {
namespace {

// Elements a thread should own before a second one pays.
constexpr int64_t kElementsPerThread = 16384;
// Rows and columns that are transposed while they are in the cache.
constexpr int64_t kTile = 64;
// What operands of products on tensor cores are multiples of.
constexpr int64_t kMultiple = 16;

}  // namespace

void check(const Fp8RowsParams& params) {
    const Checker check("fp8_rows");
    check.floating("x", params.x, 2);
    check.typed("scales", params.scales, DType::kFloat32, 2);
    check.same_device({{"x", &params.x}, {"columns", &params.columns}});
    if (!params.columns) return;
    check.typed("columns", params.columns, DType::kFloat32, 1);
    check.dim("columns", params.columns, 0, params.x.size(1), "the columns of 'x'");
}

void check(const Fp8TransposeParams& params) {
    const Checker check("fp8_transpose");
    for (const int64_t size : {params.rows, params.columns}) {
        check.that(size % kMultiple == 0, "x", "sizes that are multiples of 16", size);
    }
}

void fp8_rows_cpu(const Fp8RowsParams& params) {
    const int64_t rows = params.x.size(0), n = params.x.size(1);
    const float* columns = params.columns ? params.columns.as<const float>() : nullptr;
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(n, 1));
    cpu::dispatch_float(params.x.dtype, [&]<typename T>(T) {
        cpu::parallel_ranges(rows, grain, [&](int64_t first, int64_t end) {
            for (int64_t r = first; r < end; ++r) {
                params.scales.as<float>()[r] = cpu::quantise_row(params.x.as<const T>() + r * n,
                                                                 columns, n, params.values + r * n);
            }
        });
    });
}

void fp8_transpose_cpu(const Fp8TransposeParams& params) {
    const int64_t rows = params.rows, columns = params.columns;
    cpu::parallel_for((columns + kTile - 1) / kTile, [&](int64_t tile, int) {
        const int64_t end = std::min(columns, (tile + 1) * kTile);
        for (int64_t first = 0; first < rows; first += kTile) {
            for (int64_t c = tile * kTile; c < end; ++c) {
                for (int64_t r = first; r < std::min(rows, first + kTile); ++r) {
                    params.y[c * rows + r] = params.x[r * columns + c];
                }
            }
        }
    });
}

}  // namespace lemo
