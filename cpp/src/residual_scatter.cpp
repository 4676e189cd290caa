#include "lemo/residual_scatter.h"

#include "convert.h"
#include "lemo/check.h"
#include "parallel.h"

namespace lemo {
namespace {

// Rows a thread should own before a second one pays.
constexpr int64_t kRowsPerThread = 64;

void check_rows(const Checker& check, const char* residual_name, const Tensor& residual,
                const char* packed_name, const Tensor& packed, const Tensor& rows) {
    check.floating(residual_name, residual, 2);
    check.floating(packed_name, packed, 2);
    check.dim(packed_name, packed, 1, residual.size(1), "the hidden size of the residual");
    check.same_device({{residual_name, &residual}, {packed_name, &packed}, {"rows", &rows}});
    if (rows) {
        check.typed("rows", rows, DType::kInt32, 1);
        check.ascending_rows("rows", rows, residual.size(0));
    }
    check.dim(packed_name, packed, 0, rows ? rows.size(0) : residual.size(0),
              rows ? "the number of 'rows'" : "every row, as 'rows' is None");
}

}  // namespace

void check(const ResidualScatterParams& params) {
    check_rows(Checker("residual_scatter"), "x", params.x, "y", params.y, params.rows);
    const Checker check("residual_scatter");
    check.separate("x", params.x, {{"y", &params.y}, {"rows", &params.rows}});
}

void check(const GatherRowsParams& params) {
    const Checker check("gather_rows");
    check_rows(check, "x", params.x, "y", params.y, params.rows);
    check.same_dtype("y", params.y, "x", params.x);
}

void residual_scatter_cpu(const ResidualScatterParams& params) {
    const int32_t* row = params.rows ? params.rows.as<const int32_t>() : nullptr;
    const int64_t hidden = params.x.size(1);
    cpu::dispatch_float(params.x.dtype, [&]<typename X>(X) {
        cpu::dispatch_float(params.y.dtype, [&]<typename Y>(Y) {
            X* x = params.x.as<X>();
            const Y* y = params.y.as<const Y>();
            const auto add_rows = [&](int64_t first, int64_t end) {
                for (int64_t r = first; r < end; ++r) {
                    X* to = x + (row ? row[r] : r) * hidden;
                    const Y* from = y + r * hidden;
                    for (int64_t i = 0; i < hidden; ++i) {
                        cpu::store(to + i, cpu::load(to[i]) + cpu::load(from[i]));
                    }
                }
            };
            cpu::parallel_ranges(params.y.size(0), kRowsPerThread, add_rows);
        });
    });
}

void gather_rows_cpu(const GatherRowsParams& params) {
    const int32_t* row = params.rows ? params.rows.as<const int32_t>() : nullptr;
    const int64_t hidden = params.x.size(1);
    cpu::dispatch_float(params.x.dtype, [&]<typename T>(T) {
        const T* x = params.x.as<const T>();
        T* y = params.y.as<T>();
        cpu::parallel_ranges(params.y.size(0), kRowsPerThread, [&](int64_t first, int64_t end) {
            for (int64_t r = first; r < end; ++r) {
                const T* from = x + (row ? row[r] : r) * hidden;
                std::copy(from, from + hidden, y + r * hidden);
            }
        });
    });
}

}  // namespace lemo
