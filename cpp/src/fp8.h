// Rows in e4m3 on the CPU, bit by bit what the GPU makes of them (NaN but for its sign).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "convert.h"
#include "lemo/fp8.h"
#include "multiversion.h"

namespace lemo::cpu {

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
LEMO_MULTIVERSION static float largest_magnitude(const T* x, const float* columns, int64_t n) {
    float found = 0;
#pragma omp simd reduction(max : found)
    for (int64_t i = 0; i < n; ++i) {
        const float value = std::fabs(load(x[i]) * (columns ? columns[i] : 1.0f));
        found = value > found ? value : found;  // false for NaN, which shows in the values
    }
    return found;
}

template <typename T>
LEMO_MULTIVERSION static void quantise(const T* x, const float* columns, float inverse, int64_t n,
                                       uint8_t* values) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        values[i] = to_e4m3(load(x[i]) * (columns ? columns[i] : 1.0f) * inverse);
    }
}

/// Writes a row of n numbers, times those of `columns` if there are any; returns its scale.
template <typename T>
float quantise_row(const T* x, const float* columns, int64_t n, uint8_t* values) {
    const float magnitude = std::max(largest_magnitude(x, columns, n), kFp8LeastMagnitude);
    quantise(x, columns, kFp8Largest / magnitude, n, values);
    return magnitude / kFp8Largest;
}

}  // namespace lemo::cpu
