// Random inputs of the C++ GPU tests and benchmarks: the same on every run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "convert.h"

namespace lemo::testing {

/// `n` normally distributed values, rounded to T.
template <typename T>
std::vector<T> random_values(int64_t n, uint32_t seed, float scale = 1.0f, float mean = 0.0f) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(mean, scale);
    std::vector<T> values(static_cast<size_t>(n));
    for (T& value : values) cpu::store(&value, normal(generator));
    return values;
}

/// The same values in fp32, for the oracle.
template <typename T>
std::vector<float> widen(const std::vector<T>& values) {
    std::vector<float> wide(values.size());
    cpu::load_row(wide.data(), values.data(), static_cast<int64_t>(values.size()));
    return wide;
}

/// The values rounded to T.
template <typename T>
std::vector<T> narrow(const std::vector<float>& values) {
    std::vector<T> rounded(values.size());
    for (size_t i = 0; i < values.size(); ++i) cpu::store(&rounded[i], values[i]);
    return rounded;
}

/// `kept` of the rows below `tokens`, ascending.
inline std::vector<int32_t> random_rows(int64_t tokens, int64_t kept, uint32_t seed) {
    std::vector<int32_t> rows(static_cast<size_t>(tokens));
    std::iota(rows.begin(), rows.end(), 0);
    std::shuffle(rows.begin(), rows.end(), std::mt19937(seed));
    rows.resize(static_cast<size_t>(kept));
    std::sort(rows.begin(), rows.end());
    return rows;
}

/// Every second block of 64 rows: the shape of a layer at keep 0.5.
inline std::vector<int32_t> half_of_the_blocks(int64_t tokens) {
    std::vector<int32_t> rows(static_cast<size_t>(tokens / 2));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i / 64 * 128 + i % 64);
    return rows;
}

}  // namespace lemo::testing
