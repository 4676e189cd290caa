#include "lemo/residual_scatter.h"

#include "convert.h"
#include "lemo/check.h"
#include "parallel.h"

namespace lemo {
namespace {

// Rows a thread should own before a second one pays.
constexpr int64_t kRowsPerThread = 64;

void check_stream(const Checker& check, const char* stream_name, const Tensor& stream,
                  const char* packed_name, const Tensor& packed, const Tensor& rows) {
    check.floating(stream_name, stream, 2);
    check.floating(packed_name, packed, 2);
    check.dim(packed_name, packed, 1, stream.size(1), "the hidden size of the stream");
    check.same_device({{stream_name, &stream}, {packed_name, &packed}, {"rows", &rows}});
    if (rows) {
        check.typed("rows", rows, DType::kInt32, 1);
        check.ascending_rows("rows", rows, stream.size(0));
    }
    check.dim(packed_name, packed, 0, rows ? rows.size(0) : stream.size(0),
              rows ? "the number of 'rows'" : "every row, as 'rows' is None");
}

}  // namespace

void check(const ResidualScatterParams& params) {
    check_stream(Checker("residual_scatter"), "x", params.x, "y", params.y, params.rows);
    const Checker check("residual_scatter");
    check.separate("x", params.x, {{"y", &params.y}, {"rows", &params.rows}});
}

void check(const ResidualGatherParams& params) {
    const Checker check("gather_rows");
    check_stream(check, "dx", params.dx, "dy", params.dy, params.rows);
    check.same_dtype("dy", params.dy, "dx", params.dx);
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

void residual_gather_cpu(const ResidualGatherParams& params) {
    const int32_t* row = params.rows ? params.rows.as<const int32_t>() : nullptr;
    const int64_t hidden = params.dx.size(1);
    cpu::dispatch_float(params.dx.dtype, [&]<typename T>(T) {
        const T* dx = params.dx.as<const T>();
        T* dy = params.dy.as<T>();
        cpu::parallel_ranges(params.dy.size(0), kRowsPerThread, [&](int64_t first, int64_t end) {
            for (int64_t r = first; r < end; ++r) {
                const T* from = dx + (row ? row[r] : r) * hidden;
                std::copy(from, from + hidden, dy + r * hidden);
            }
        });
    });
}

}  // namespace lemo
