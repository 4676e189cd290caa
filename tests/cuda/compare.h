// The one place that says how close a CUDA result is to the CPU's fp32 result.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "convert.h"
#include "random_values.h"

namespace lemo::testing {

using StorageTypes = ::testing::Types<float, cpu::BFloat16, cpu::Float16>;
using LowPrecisionTypes = ::testing::Types<cpu::BFloat16, cpu::Float16>;

/// ||value - oracle|| / ||oracle||; infinite where a special value differs.
template <typename T>
double relative_error(const std::vector<T>& value, const std::vector<float>& oracle) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < oracle.size(); ++i) {
        const double got = cpu::load(value[i]), expected = oracle[i];
        if (std::isfinite(expected) && std::isfinite(got)) {
            difference += (got - expected) * (got - expected);
            norm += expected * expected;
        } else if (!(got == expected || (std::isnan(got) && std::isnan(expected)))) {
            return INFINITY;
        }
    }
    return std::sqrt(difference) / (norm > 0 ? std::sqrt(norm) : 1.0);
}

/// A result that is computed in fp32 and rounded once to T. `roundings`: how often the kernel
/// rounds on the way there, for example 2 where products take a rounded intermediate.
template <typename T>
void expect_close(const std::vector<T>& value, const std::vector<float>& oracle,
                  const std::string& what = "result", int roundings = 1) {
    ASSERT_EQ(value.size(), oracle.size()) << what;
    double bound = 2e-5;
    if constexpr (std::is_same_v<T, cpu::BFloat16>) bound = 0x1p-8;
    if constexpr (std::is_same_v<T, cpu::Float16>) bound = 0x1p-11;
    EXPECT_LE(relative_error(value, oracle), bound * roundings) << what;
}

/// Two results of one kernel on the same inputs.
template <typename T>
void expect_same_bits(const std::vector<T>& first, const std::vector<T>& second,
                      const std::string& what = "result") {
    ASSERT_EQ(first.size(), second.size()) << what;
    size_t different = 0;
    const auto* a = reinterpret_cast<const unsigned char*>(first.data());
    const auto* b = reinterpret_cast<const unsigned char*>(second.data());
    for (size_t i = 0; i < first.size() * sizeof(T); ++i) different += a[i] != b[i];
    EXPECT_EQ(different, 0u) << what << ": bytes that differ";
}

}  // namespace lemo::testing
