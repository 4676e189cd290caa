// Tiles of 2-byte elements in shared memory, swizzled so that fragment loads meet no bank twice.
#pragma once

#include <cute/swizzle.hpp>

namespace lemo::cuda {

/// Where 16-byte piece `piece` of row `row` lies in a tile of rows of kRowBytes bytes. Eight rows
/// of one column of pieces, from a multiple of eight on, fall into different banks.
template <int kRowBytes>
__device__ __forceinline__ int swizzled(int row, int piece) {
    static_assert(kRowBytes == 64 || kRowBytes == 128 || kRowBytes == 256 || kRowBytes == 512,
                  "a swizzle is known for rows of these sizes only");
    using Swizzle = cute::Swizzle<kRowBytes == 64 ? 2 : 3, 4,
                                  kRowBytes == 512   ? 5
                                  : kRowBytes == 256 ? 4
                                                     : 3>;
    return Swizzle::apply(row * kRowBytes + piece * 16);
}

/// A lane's reads of a swizzled tile by load_matrices; what depends on the lane is worked out once.
/// `row` is the lane's row; `half` says which 8 of the 16 elements of a step it reads.
template <int kRowBytes>
struct FragmentReader {
    int row_offset, low;

    __device__ __forceinline__ FragmentReader(int row, int half)
        : row_offset(row * kRowBytes), low(swizzled<kRowBytes>(row, half) - row * kRowBytes) {}

    /// Offset of the lane's 16 bytes in step `step` of the row `rows_on` (a multiple of 8) below.
    __device__ __forceinline__ int offset(int step, int rows_on) const {
        constexpr int kSteps = kRowBytes == 64 ? 2 : 4;  // whose pieces a swizzle mixes
        return row_offset + rows_on * kRowBytes + (low ^ (step % kSteps * 32)) +
               step / kSteps * (kSteps * 32);
    }
};

/// Reads rows of A, 16 at a time.
template <int kRowBytes>
__device__ __forceinline__ FragmentReader<kRowBytes> row_reader(int first_row, int lane) {
    return {first_row + lane % 16, lane / 16};
}

/// Reads rows of B, 16 at a time: the fragments of 8 of them, then those of the other 8.
template <int kRowBytes>
__device__ __forceinline__ FragmentReader<kRowBytes> column_reader(int first_row, int lane) {
    return {first_row + lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

}  // namespace lemo::cuda
