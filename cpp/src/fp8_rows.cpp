#include "lemo/fp8_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "convert.h"
#include "lemo/check.h"
#include "multiversion.h"
#include "parallel.h"

namespace lemo {
namespace {

// Elements a thread should own before a second one pays.
constexpr int64_t kElementsPerThread = 16384;
// Rows and columns that are transposed while they are in the cache.
constexpr int64_t kTile = 64;
// What operands of products on tensor cores are multiples of.
constexpr int64_t kMultiple = 16;

/// The bits of x as e4m3, to nearest even. Magnitudes beyond the largest number become it.
[[gnu::always_inline]] inline uint8_t to_e4m3(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    // Added to 2^14, whose last bit stands for e4m3's smallest number, 2^-9: fp32's own rounding.
    const float sum = std::bit_cast<float>(magnitude) + 0x1p14f;
    const uint32_t subnormal = std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0x1p14f);
    const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
    const uint32_t normal = (rounded >> 20) - ((127u - 7u) << 3);
    uint32_t result = magnitude < std::bit_cast<uint32_t>(0x1p-6f) ? subnormal : normal;
    result = magnitude > std::bit_cast<uint32_t>(kFp8Largest) ? 0x7eu : result;
    result = magnitude > 0x7f800000u ? 0x7fu : result;
    return static_cast<uint8_t>(sign | result);
}

template <typename T>
LEMO_MULTIVERSION float largest(const T* x, const float* columns, int64_t n) {
    float found = 0;
#pragma omp simd reduction(max : found)
    for (int64_t i = 0; i < n; ++i) {
        const float value = std::fabs(cpu::load(x[i]) * (columns ? columns[i] : 1.0f));
        found = value > found ? value : found;  // false for NaN, which shows in the values
    }
    return found;
}

template <typename T>
LEMO_MULTIVERSION void quantise(const T* x, const float* columns, float inverse, int64_t n,
                                uint8_t* values) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        values[i] = to_e4m3(cpu::load(x[i]) * (columns ? columns[i] : 1.0f) * inverse);
    }
}

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
                const T* x = params.x.as<const T>() + r * n;
                const float magnitude = std::max(largest(x, columns, n), kFp8LeastMagnitude);
                params.scales.as<float>()[r] = magnitude / kFp8Largest;
                quantise(x, columns, kFp8Largest / magnitude, n, params.values + r * n);
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
