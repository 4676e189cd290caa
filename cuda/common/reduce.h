// Sums and maxima over the threads of a block.
#pragma once

#include <cuda_runtime.h>

namespace lemo::cuda {

/// Floats of shared memory that a reduction needs.
inline constexpr int kReduceScratch = 32;

/// `combine` over the values of a warp in a fixed order, the same bits in every lane. All lanes
/// take part.
template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine&& combine) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    return value;
}

/// `combine` over every thread's value in a fixed order, the same bits in every thread. All threads
/// take part; `scratch` may be that of an earlier reduction.
template <int kThreads, typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T* scratch, Combine&& combine) {
    static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps of one block");
    value = warp_reduce(value, combine);
    __syncthreads();  // scratch may still be read from an earlier reduction
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    T result = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) result = combine(result, scratch[warp]);
    return result;
}

template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
    return block_reduce<kThreads>(value, scratch, [](T a, T b) { return a + b; });
}

/// The largest value; NaN counts as the smallest.
template <int kThreads>
__device__ __forceinline__ float block_max(float value, float* scratch) {
    return block_reduce<kThreads>(value, scratch, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace lemo::cuda
