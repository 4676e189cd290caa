// Where a thread of a warpgroup finds its part of the accumulators [64, columns] of wgmma.
//
// Lane l of warp w holds rows 16 w + l / 4 and the eighth one after it, of each group of eight
// columns the two from 2 (l % 4) on: element 4 g + 2 r + c is row r of the two, column c of
// group g.
#pragma once

#include <cstdint>

namespace lemo::cuda::segment_attention::hopper {

/// Rows of the accumulators that a thread holds parts of.
inline constexpr int kThreadRows = 2;

/// Elements that a thread holds of each of its rows.
template <int kColumns>
inline constexpr int kRowElements = kColumns / 4;

/// Index of element `element` of row `row` (0 or 1) among a thread's accumulators.
constexpr int element_index(int row, int element) {
    return element / 2 * 4 + row * 2 + element % 2;
}

/// Row 0 of a thread among the 64 of its warpgroup; row 1 is the eighth after it.
__device__ __forceinline__ int thread_row() {
    return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
}

/// The column of element 0 of a thread's rows.
__device__ __forceinline__ int thread_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }

/// The column of an element, relative to `thread_column`.
constexpr int element_column(int element) { return element / 2 * 8 + element % 2; }

}  // namespace lemo::cuda::segment_attention::hopper
