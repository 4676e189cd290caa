// Copies from global to shared memory in the background (cp.async, compute capability 8.0 and
// newer).
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include <cstdint>

namespace lemo::cuda {

/// Starts the copy of the first `bytes` <= 16 bytes at `from`; the others of the 16 become zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
}

/// Starts the copy of 16 bytes, or of zeros unless `valid`. `from` must be an address of the array
/// even where nothing is read.
__device__ __forceinline__ void copy_async_if(bool valid, void* to, const void* from) {
    copy_async(to, from, valid ? 16 : 0);
}

/// Closes a group of this thread's copies; it may be empty.
__device__ __forceinline__ void commit_copies() { cute::cp_async_fence(); }

/// Waits until all but the last `pending` groups of this thread have arrived. Other threads see
/// them after a __syncthreads().
template <int pending>
__device__ __forceinline__ void wait_copies() {
    cute::cp_async_wait<pending>();
}

}  // namespace lemo::cuda
