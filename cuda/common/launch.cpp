#include "common/launch.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace lemo::cuda {
namespace {

int current_device(const char* op) {
    int device = 0;
    check_status(op, cudaGetDevice(&device));
    return device;
}

int attribute(const char* op, cudaDeviceAttr which, int device) {
    int value = 0;
    check_status(op, cudaDeviceGetAttribute(&value, which, device));
    return value;
}

}  // namespace

const Gpu& current_gpu(const char* op) {
    static std::mutex mutex;
    static std::map<int, Gpu> gpus;  // by device; entries stay where they are
    const int device = current_device(op);
    const std::lock_guard lock(mutex);
    const auto known = gpus.find(device);
    if (known != gpus.end()) return known->second;
    const auto ask = [&](cudaDeviceAttr which) { return attribute(op, which, device); };
    const Gpu gpu{
        10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
        ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    return gpus.emplace(device, gpu).first->second;
}

void reserve_shared_memory(const char* op, const void* kernel, size_t bytes) {
    // What has been granted, by device and kernel: CUDA is asked once, not at every launch.
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, size_t> granted;
    const std::pair key(current_device(op), kernel);
    const std::lock_guard lock(mutex);
    const auto known = granted.find(key);
    if (known != granted.end() && bytes <= known->second) return;

    cudaFuncAttributes attributes;
    check_status(op, cudaFuncGetAttributes(&attributes, kernel));
    const size_t total = bytes + attributes.sharedSizeBytes;
    // What every kernel may use unasked, its own arrays included.
    constexpr size_t kUnasked = 48 * 1024;
    if (total > kUnasked) {
        const auto limit = static_cast<size_t>(current_gpu(op).block_shared_bytes);
        // The limit first: a refusal of the attribute would stay behind as the thread's last error.
        if (total > limit ||
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)) != cudaSuccess) {
            cudaGetLastError();
            throw Error(ErrorKind::kUnsupported,
                        std::string(op) + ": needs " + std::to_string(total) +
                            " bytes of shared memory a block; this GPU gives " +
                            std::to_string(limit));
        }
    }
    granted[key] = bytes;
}

}  // namespace lemo::cuda
