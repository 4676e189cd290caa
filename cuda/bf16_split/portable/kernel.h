// The kernel of bf16_split: element by element, bound by bandwidth, and mostly by its launch.
#pragma once

#include <cutlass/numeric_types.h>

#include "common/vector.h"

namespace lemo::cuda::bf16_split::portable {

constexpr int kThreads = 256;

/// Writes the blocks of neighbours of a row to y, which is `columns` wide.
template <int kWidth>
__device__ __forceinline__ void store_blocks(const cutlass::AlignedArray<float, kWidth>& value,
                                             float scale, bool left, cutlass::bfloat16_t* y,
                                             int64_t columns) {
    cutlass::AlignedArray<cutlass::bfloat16_t, kWidth> high, low;
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < kWidth; ++e) {
        const float scaled = __fmul_rn(scale, value[e]);  // the rest is that of the rounded one
        high[e] = cutlass::bfloat16_t(scaled);
        // The rest of an infinity is none.
        const float rest = scaled - float(high[e]);
        low[e] = cutlass::bfloat16_t(isinf(float(high[e])) ? 0.0f : rest);
    }
    store_vector<kWidth>(y, high);
    store_vector<kWidth>(y + columns, left ? high : low);
    store_vector<kWidth>(y + 2 * columns, left ? low : high);
}

/// A thread takes kWidth neighbours of a row. Grid: rows and their columns, side by side.
template <int kWidth, bool kByBlocks>
__global__ void
__launch_bounds__(kThreads)
split_kernel(const float* __restrict__ x, cutlass::bfloat16_t* __restrict__ y, int64_t rows,
             int64_t columns, float scale, bool left) {
    const int64_t vectors = columns / kWidth;
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= rows * vectors) return;
    const int64_t row = i / vectors, column = i % vectors * kWidth;

    const float* from = x + row * (kByBlocks ? 3 * columns : columns) + column;
    auto value = load_vector<kWidth>(from);
    if constexpr (kByBlocks) {
        const auto other = load_vector<kWidth>(from + columns);
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < kWidth; ++e) value[e] += other[e];
    }
    store_blocks<kWidth>(value, scale, left, y + row * 3 * columns + column, columns);
}

/// Some matrices of a launch.
struct Matrices {
    static constexpr int kMost = 16;

    const float* x[kMost];
    cutlass::bfloat16_t* y[kMost];
    int64_t columns[kMost];
    int64_t ends[kMost];  // in vectors, those of the matrices before included
};

/// A thread takes kWidth neighbours of a row of one of the matrices. Grid: all of them, one behind
/// another.
template <int kWidth>
__global__ void
__launch_bounds__(kThreads)
split_all_kernel(__grid_constant__ const Matrices matrices, int count) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    int m = 0;
    while (m < count && i >= matrices.ends[m]) ++m;
    if (m == count) return;
    const int64_t columns = matrices.columns[m], vectors = columns / kWidth;
    const int64_t in_matrix = i - (m == 0 ? 0 : matrices.ends[m - 1]);
    const int64_t row = in_matrix / vectors, column = in_matrix % vectors * kWidth;

    const auto value = load_vector<kWidth>(matrices.x[m] + row * columns + column);
    store_blocks<kWidth>(value, 1.0f, false, matrices.y[m] + row * 3 * columns + column, columns);
}

}  // namespace lemo::cuda::bf16_split::portable
