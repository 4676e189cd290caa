// The kernel of bf16_split: element by element, bound by bandwidth, and mostly by its launch.
#pragma once

#include <cutlass/numeric_types.h>

#include "common/vector.h"

namespace lemo::cuda::bf16_split::portable {

constexpr int kThreads = 256;

/// A thread takes kWidth neighbours of a row. Grid: rows and their columns, side by side.
template <int kWidth, bool kByBlocks>
__global__ void
__launch_bounds__(kThreads)
split_kernel(const float* __restrict__ x, cutlass::bfloat16_t* __restrict__ y, int64_t rows,
             int64_t columns, float scale, bool left) {
    using Part = cutlass::AlignedArray<cutlass::bfloat16_t, kWidth>;
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
    Part high, low;
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < kWidth; ++e) {
        const float scaled = __fmul_rn(scale, value[e]);  // the rest is that of the rounded one
        high[e] = cutlass::bfloat16_t(scaled);
        // The rest of an infinity is none.
        const float rest = scaled - float(high[e]);
        low[e] = cutlass::bfloat16_t(isinf(float(high[e])) ? 0.0f : rest);
    }
    cutlass::bfloat16_t* to = y + row * 3 * columns + column;
    store_vector<kWidth>(to, high);
    store_vector<kWidth>(to + columns, left ? high : low);
    store_vector<kWidth>(to + 2 * columns, left ? low : high);
}

}  // namespace lemo::cuda::bf16_split::portable
