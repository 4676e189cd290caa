#include "lemo/rope.h"

#include <string>
#include <vector>

#include "convert.h"
#include "lemo/check.h"
#include "multiversion.h"
#include "parallel.h"

namespace lemo {
namespace {

// Rows a thread should own before a second one pays.
constexpr int64_t kRowsPerThread = 32;

/// The map of one row: y1 = x1 * c1 + x2 * cross1, y2 = x2 * c2 + x1 * cross2.
struct RowMap {
    std::vector<float> c, cross;  // [D] each, first and second halves

    explicit RowMap(int64_t head_size)
        : c(static_cast<size_t>(head_size)), cross(static_cast<size_t>(head_size)) {}

    template <typename T>
    void load(const T* cos, const T* sin, bool transposed) {
        const size_t half = c.size() / 2;
        for (size_t i = 0; i < half; ++i) {
            c[i] = cpu::load(cos[i]);
            c[half + i] = cpu::load(cos[half + i]);
            const float sin1 = cpu::load(sin[i]), sin2 = cpu::load(sin[half + i]);
            cross[i] = transposed ? sin2 : -sin1;
            cross[half + i] = transposed ? -sin1 : sin2;
        }
    }
};

/// Rotates the heads of one row. Both halves of a head are read before either is written.
template <typename T>
LEMO_MULTIVERSION void rotate_row(const T* x, const float* c, const float* cross, int64_t heads,
                                  int64_t half, T* y) {
    for (int64_t h = 0; h < heads; ++h, x += 2 * half, y += 2 * half) {
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const float x1 = cpu::load(x[i]), x2 = cpu::load(x[half + i]);
            cpu::store(y + i, x1 * c[i] + x2 * cross[i]);
            cpu::store(y + half + i, x2 * c[half + i] + x1 * cross[half + i]);
        }
    }
}

void check_rows(const Checker& check, const Tensor& rows, int64_t num_tables) {
    check.typed("rows", rows, DType::kInt32, 1);
    if (rows.device != Device::kCpu) return;
    const int32_t* row = rows.as<const int32_t>();
    for (int64_t r = 0; r < rows.size(0); ++r) {
        if (row[r] >= 0 && row[r] < num_tables) continue;
        check.fail("rows", "rows of the tables, below " + std::to_string(num_tables),
                   std::to_string(row[r]) + " at index " + std::to_string(r));
    }
}

}  // namespace

void check(const RopeParams& params) {
    const Checker check("rope");
    check.floating("x", params.x, 3);
    check.that(params.x.size(2) % 2 == 0, "x", "an even head size", params.x);
    for (const auto& [argument, table] : {std::pair{"cos", &params.cos}, {"sin", &params.sin}}) {
        check.floating(argument, *table, 2);
        check.dim(argument, *table, 1, params.x.size(2), "the head size of 'x'");
    }
    check.same_dtype("sin", params.sin, "cos", params.cos);
    check.dim("sin", params.sin, 0, params.cos.size(0), "the rows of 'cos'");
    check.same_device(
        {{"x", &params.x}, {"cos", &params.cos}, {"sin", &params.sin}, {"rows", &params.rows}});
    if (params.rows) {
        check_rows(check, params.rows, params.cos.size(0));
        check.dim("rows", params.rows, 0, params.x.size(0), "the rows of 'x'");
    } else {
        check.dim("cos", params.cos, 0, params.x.size(0), "the rows of 'x', as 'rows' is None");
    }
    check.floating("y", params.y, 3);
    check.same_dtype("y", params.y, "x", params.x);
    for (int i = 0; i < 3; ++i) check.dim("y", params.y, i, params.x.size(i), "the size of 'x'");
}

void rope_cpu(const RopeParams& params) {
    const int64_t heads = params.x.size(1), head_size = params.x.size(2);
    const int32_t* row = params.rows ? params.rows.as<const int32_t>() : nullptr;
    cpu::dispatch_float(params.x.dtype, [&]<typename T>(T) {
        cpu::dispatch_float(params.cos.dtype, [&]<typename Table>(Table) {
            const T* x = params.x.as<const T>();
            T* y = params.y.as<T>();
            const Table* cos = params.cos.as<const Table>();
            const Table* sin = params.sin.as<const Table>();
            const auto rotate_rows = [&](int64_t first, int64_t end) {
                RowMap map(head_size);
                for (int64_t r = first; r < end; ++r) {
                    const int64_t table = (row ? row[r] : r) * head_size;
                    map.load(cos + table, sin + table, params.transposed);
                    const int64_t at = r * heads * head_size;
                    rotate_row(x + at, map.c.data(), map.cross.data(), heads, head_size / 2,
                               y + at);
                }
            };
            cpu::parallel_ranges(params.x.size(0), kRowsPerThread, rotate_rows);
        });
    });
}

}  // namespace lemo
