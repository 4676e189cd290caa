// Sums over the threads of a block.
#pragma once

#include <cuda_runtime.h>

namespace lemo::cuda {

/// Floats of shared memory that block_sum needs.
inline constexpr int kReduceScratch = 32;

/// The sum of every thread's value, the same bits in every thread. All threads take part.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps of one block");
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    __syncthreads();  // scratch may still be read from an earlier sum
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += scratch[warp];
    return sum;
}

}  // namespace lemo::cuda
