// An exponential that vectorises.
#pragma once

#include <bit>
#include <cstdint>

namespace lemo::cpu {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;

/// 2^x for x <= 127 with a relative error below 2.5e-7; 2^-126 where x is smaller than -126. NaN
/// stays NaN. Branch-free, so loops over it vectorise.
[[gnu::always_inline]] inline float exp2_fast(float x) {
    x = x < -126.0f ? -126.0f : x;
    // Adding 1.5 * 2^23 leaves x, rounded to an integer, in the low bits of the mantissa.
    constexpr float kRound = 12582912.0f;
    const float shifted = x + kRound;
    const float fraction = x - (shifted - kRound);
    // Minimax polynomial of 2^f on [-1/2, 1/2].
    float y = 0.001326472731307149f;
    y = y * fraction + 0.009671512991189957f;
    y = y * fraction + 0.05550733581185341f;
    y = y * fraction + 0.24022242426872253f;
    y = y * fraction + 0.6931470036506653f;
    y = y * fraction + 1.0f;
    const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
    return y * std::bit_cast<float>(exponent);
}

}  // namespace lemo::cpu
