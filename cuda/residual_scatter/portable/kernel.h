// The kernel of residual_scatter and of its adjoint, gather_rows: one warp for each packed row,
// 16-byte accesses, one writer, no atomics.
#pragma once

#include "common/vector.h"

namespace lemo::cuda::residual_scatter::portable {

constexpr int kWarpsPerBlock = 8;
// Vectors that a lane loads before it stores the first.
constexpr int kInFlight = 4;

/// Adds packed rows to the residual or copies them out of it. Packed row r belongs to row `rows[r]`
/// of the residual, or to row r without `rows`.
template <typename Residual, typename Packed, bool kScatter>
__global__ void
__launch_bounds__(kWarpsPerBlock * 32)
residual_rows_kernel(Residual* __restrict__ residual, Packed* __restrict__ packed,
                     const int32_t* __restrict__ rows, int64_t num_rows, int64_t hidden,
                     bool vectorised) {
    // The wider type decides how many elements make one 16-byte access of it.
    constexpr int kElements = 16 / (sizeof(Residual) > sizeof(Packed) ? sizeof(Residual)
                                                                       : sizeof(Packed));
    const int64_t row_idx = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
    if (row_idx >= num_rows) return;
    Residual* x = residual + (rows ? int64_t{rows[row_idx]} : row_idx) * hidden;
    Packed* y = packed + row_idx * hidden;
    const int lane = threadIdx.x % 32;

    const int64_t vector_end = vectorised ? hidden : 0;
    for (int64_t first = lane * kElements; first < vector_end;
         first += kInFlight * 32 * kElements) {
        // All loads before the first store: the compiler may not move one past the other.
        cutlass::AlignedArray<Residual, kElements> from_residual[kInFlight];
        cutlass::AlignedArray<Packed, kElements> from_packed[kInFlight];
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kInFlight; ++v) {
            const int64_t i = first + v * 32 * kElements;
            if (i >= vector_end) continue;
            from_residual[v] = load_vector<kElements>(x + i);
            if constexpr (kScatter) from_packed[v] = load_vector<kElements>(y + i);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kInFlight; ++v) {
            const int64_t i = first + v * 32 * kElements;
            if (i >= vector_end) continue;
            if constexpr (kScatter) {
                CUTLASS_PRAGMA_UNROLL
                for (int e = 0; e < kElements; ++e) {
                    from_residual[v][e] =
                        Residual(float(from_residual[v][e]) + float(from_packed[v][e]));
                }
                store_vector<kElements>(x + i, from_residual[v]);
            } else {
                store_vector<kElements>(y + i, from_residual[v]);
            }
        }
    }
    for (int64_t i = vector_end + lane; i < hidden; i += 32) {
        if constexpr (kScatter) {
            x[i] = Residual(float(x[i]) + float(y[i]));
        } else {
            y[i] = x[i];
        }
    }
}

}  // namespace lemo::cuda::residual_scatter::portable
