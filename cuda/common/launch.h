// Launch errors and storage-type dispatch of the CUDA kernels.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include <cutlass/numeric_types.h>

#include "lemo/blocks.h"
#include "lemo/check.h"

namespace lemo::cuda {

inline void check_status(const char* op, cudaError_t status) {
    if (status != cudaSuccess) {
        throw Error(ErrorKind::kUnsupported,
                    std::string(op) + ": CUDA failed: " + cudaGetErrorString(status));
    }
}

inline void check_launch(const char* op) { check_status(op, cudaGetLastError()); }

/// Multiprocessors of the current GPU.
inline int num_multiprocessors(const char* op) {
    int device = 0, count = 0;
    check_status(op, cudaGetDevice(&device));
    check_status(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

/// Lets `kernel` use this much dynamic shared memory; raises where the GPU has less.
template <typename Kernel>
void reserve_shared_memory(const char* op, Kernel* kernel, size_t bytes) {
    cudaFuncAttributes attributes;
    check_status(op, cudaFuncGetAttributes(&attributes, kernel));
    const size_t total = bytes + attributes.sharedSizeBytes;
    if (total <= 48 * 1024) return;  // what every kernel may use unasked, its own arrays included
    int device = 0, limit = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    // The limit first: a refusal of the attribute would stay behind as the thread's last error.
    if (total > static_cast<size_t>(limit) ||
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)) != cudaSuccess) {
        cudaGetLastError();
        throw Error(ErrorKind::kUnsupported,
                    std::string(op) + ": needs " + std::to_string(total) +
                        " bytes of shared memory a block; this GPU gives " +
                        std::to_string(limit));
    }
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

}  // namespace lemo::cuda
