// How many thread blocks a CUDA kernel is launched with: the host's checks, which need no CUDA.
#pragma once

#include <cstdint>
#include <string>

#include "lemo/check.h"

namespace lemo {

/// The most thread blocks of a grid in its first dimension, and in the second and the third one.
inline constexpr int64_t kMostBlocksX = (int64_t{1} << 31) - 1;
inline constexpr int64_t kMostBlocksYZ = 65535;

/// `blocks` as a dimension of a grid that holds at most `most`. `argument` is the one of `op` whose
/// size makes so many.
inline unsigned grid_dimension(const char* op, const char* argument, int64_t blocks, int64_t most) {
    Checker(op).that(
        blocks <= most, argument,
        [&] {
            return "a size that needs at most " + std::to_string(most) +
                   " thread blocks of a CUDA kernel";
        },
        [&] { return "one that needs " + std::to_string(blocks); }, ErrorKind::kUnsupported);
    return static_cast<unsigned>(blocks);
}

/// The first dimension: the place of all counts that grow with rows. A kernel with two of them
/// takes their product here, the one of neighbouring blocks as the remainder of the division.
inline unsigned grid_x(const char* op, const char* argument, int64_t blocks) {
    return grid_dimension(op, argument, blocks, kMostBlocksX);
}

/// The second and the third dimension: for heads, and for columns of weights.
inline unsigned grid_yz(const char* op, const char* argument, int64_t blocks) {
    return grid_dimension(op, argument, blocks, kMostBlocksYZ);
}

}  // namespace lemo
