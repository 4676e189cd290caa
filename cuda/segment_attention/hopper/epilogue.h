// The epilogue: results in registers are rounded and stored in global memory by way of shared
// memory, which turns them into accesses of 16 bytes.
#pragma once

#include "common/hopper.h"
#include "segment_attention/elementwise.h"

namespace lemo::cuda::segment_attention::hopper {

/// Rows of a matrix in global memory that a warp writes: the first `num_rows` of 16, the first
/// `columns` columns.
template <typename Element>
struct RowsOut {
    Element* first;
    int64_t stride;  // elements
    int num_rows;
    int columns;
};

/// The 16 bytes from column 8 * piece on of row `row` of a staging area [rows, kHeadDim]. Eight
/// rows of one column of pieces lie in different banks. In the place of a tile of kTileRows rows,
/// which holds 64 columns of all rows after the other, rows of the area are where those of the tile
/// are.
template <int kHeadDim, int kTileRows = 0, typename Element>
__device__ __forceinline__ Element* staged_piece(Element* area, int row, int piece) {
    if constexpr (kTileRows > 0) {
        return area + piece / 8 * kTileRows * 64 + row * 64 + (piece % 8 ^ row % 8) * 8;
    }
    return area + row * kHeadDim + (piece ^ (row % 8)) * 8;
}

/// Copies kRows rows of a staging area, from `first_row` on, to where they belong; a warp's work.
template <int kHeadDim, int kRows, int kTileRows = 0, typename Element>
__device__ __forceinline__ void write_staged(Element* area, int first_row,
                                             const RowsOut<Element>& out) {
    constexpr int kPieces = kHeadDim / 8;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int piece = lane % kPieces;
    // Lanes beyond a whole number of rows have no share.
    if (piece * 8 >= out.columns || lane >= 32 / kPieces * kPieces) return;
    CUTE_UNROLL
    for (int r = lane / kPieces; r < kRows; r += 32 / kPieces) {
        if (r >= out.num_rows) break;
        *reinterpret_cast<uint4*>(out.first + r * out.stride + piece * 8) =
            *reinterpret_cast<const uint4*>(
                staged_piece<kHeadDim, kTileRows>(area, first_row + r, piece));
    }
}

/// Stores a warp's 16 rows of the accumulators [64, kHeadDim] of its warpgroup. `area` is the
/// warp's own staging area [16, kHeadDim].
template <int kHeadDim, int kTileRows = 0, typename Element, typename Accumulators>
__device__ __forceinline__ void store_rows(const Accumulators& accumulators, Element* area,
                                           const RowsOut<Element>& out) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto rounded = round_to<Element>(accumulators);
    const auto* pairs = reinterpret_cast<const uint32_t*>(rounded.data());
    __syncwarp();  // all lanes have read what lay there before
    CUTE_UNROLL
    for (int i = 0; i < kHeadDim / 16; ++i) {
        store_matrices(staged_piece<kHeadDim, kTileRows>(area, lane % 16, 2 * i + lane / 16),
                       pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
    }
    __syncwarp();
    write_staged<kHeadDim, 16, kTileRows>(area, 0, out);
}

/// Writes zeros to a warp's 16 rows.
template <int kHeadDim, typename Element>
__device__ __forceinline__ void store_zeros(const RowsOut<Element>& out) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int r = 0; r < min(16, out.num_rows); ++r) {
        for (int column = lane * 8; column < out.columns; column += 32 * 8) {
            *reinterpret_cast<uint4*>(out.first + r * out.stride + column) = make_uint4(0, 0, 0, 0);
        }
    }
}

}  // namespace lemo::cuda::segment_attention::hopper
