// Copies of tiles into shared memory, by the producer warp.
#pragma once

#include "common/hopper.h"

namespace lemo::cuda::segment_attention::hopper {

template <int kRows, int kHeadDim, typename Element>
inline constexpr int kTileBytes = kRows * kHeadDim * static_cast<int>(sizeof(Element));

/// Starts the copy of a tile of rows of one head, kCopyColumns columns at a time. `full` has been
/// told to expect kTileBytes.
template <int kRows, int kHeadDim, typename Element>
__device__ __forceinline__ void copy_tile(const CUtensorMap& map, Barrier& full, Element* to,
                                          int head, int row) {
    CUTE_UNROLL
    for (int column = 0; column < kHeadDim; column += kCopyColumns) {
        copy_box(map, full, to + column * kRows, column, head, row);
    }
}

}  // namespace lemo::cuda::segment_attention::hopper
