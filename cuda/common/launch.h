// Launch errors and storage-type dispatch of the CUDA kernels.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include <cutlass/numeric_types.h>

#include "lemo/blocks.h"
#include "lemo/check.h"
#include "lemo/grid.h"

namespace lemo::cuda {

inline void check_status(const char* op, cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or it would stay behind for the next launch
    // Also a launch takes memory: the code of a kernel that runs for the first time.
    const bool no_memory = status == cudaErrorMemoryAllocation;
    throw Error(no_memory ? ErrorKind::kDeviceMemory : ErrorKind::kUnsupported,
                std::string(op) + ": CUDA failed: " + cudaGetErrorString(status));
}

inline void check_launch(const char* op) { check_status(op, cudaGetLastError()); }

/// What of a GPU decides how kernels run.
struct Gpu {
    int compute_capability;  // 90: 9.0
    int multiprocessors;
    int block_shared_bytes;  // the most that a thread block can have
};

/// The current GPU, which is asked only once.
const Gpu& current_gpu(const char* op);

/// Multiprocessors of the current GPU.
inline int num_multiprocessors(const char* op) { return current_gpu(op).multiprocessors; }

/// Lets `kernel` use this much dynamic shared memory; raises where the GPU has less.
void reserve_shared_memory(const char* op, const void* kernel, size_t bytes);

template <typename Kernel>
void reserve_shared_memory(const char* op, Kernel* kernel, size_t bytes) {
    reserve_shared_memory(op, reinterpret_cast<const void*>(kernel), bytes);
}

/// Calls `body(T{})` with the storage type of `dtype`.
template <typename Body>
void dispatch_float(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::kFloat32: return body(float{});
        case DType::kBFloat16: return body(cutlass::bfloat16_t{});
        case DType::kFloat16: return body(cutlass::half_t{});
        default: throw Error(ErrorKind::kType, std::string("no CUDA kernel for ") + name(dtype));
    }
}

/// The same for storage types of two bytes: `dtype` is bfloat16 or float16.
template <typename Body>
auto dispatch_half(DType dtype, Body&& body) {
    if (dtype == DType::kBFloat16) return body(cutlass::bfloat16_t{});
    return body(cutlass::half_t{});
}

}  // namespace lemo::cuda
