// Between torch's stable ABI and the core: views of tensors, fresh results, the current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "lemo/check.h"
#include "lemo/tensor.h"

namespace lemo::torch_api {

using torch::headeronly::ScalarType;
using TorchTensor = torch::stable::Tensor;
using OptionalTensor = std::optional<TorchTensor>;
using StableDevice = torch::stable::Device;

/// A view; more than kMaxDims dimensions raise.
Tensor view(const TorchTensor& tensor);
/// A view, or an absent tensor.
Tensor view(const OptionalTensor& tensor);

/// Contiguous, as kernels want them; a copy only where the caller passed another layout.
TorchTensor to_contiguous(const TorchTensor& tensor);
OptionalTensor to_contiguous(const OptionalTensor& tensor);
/// Contiguous and from a 16-byte boundary on, where a view into a tensor need not begin.
TorchTensor to_aligned(const TorchTensor& tensor);

/// Uninitialised results on the device of `like`. Where there is no memory they raise kMemory or
/// kDeviceMemory, as copies do.
TorchTensor make_empty(const TorchTensor& like, std::initializer_list<int64_t> shape,
                       ScalarType dtype);
TorchTensor make_empty(const TorchTensor& like, std::initializer_list<int64_t> shape);

/// A copy in the host's memory, for which the host waits.
TorchTensor copy_to_host(const TorchTensor& tensor);

/// Checks `params`, then runs the kernel of the device of `on`. Without a CUDA kernel pass nullptr:
/// a CUDA tensor then raises and lists what is supported.
template <typename Params>
void run(const char* op, const TorchTensor& on, const Params& params, void (*cpu)(const Params&),
         std::type_identity_t<void (*)(const Params&, void*)> cuda);

int32_t device_index(const TorchTensor& on);
void* current_cuda_stream(const TorchTensor& on);
[[noreturn]] void raise_unsupported_device(const char* op, const TorchTensor& on, bool has_cuda);

template <typename Params>
void run(const char* op, const TorchTensor& on, const Params& params, void (*cpu)(const Params&),
         std::type_identity_t<void (*)(const Params&, void*)> cuda) {
    check(params);
    const Device device = view(on).device;
    if (device == Device::kCpu) {
        try {
            cpu(params);
        } catch (const std::bad_alloc&) {
            throw Error(ErrorKind::kMemory, std::string(op) + ": cannot allocate scratch on cpu");
        }
    } else if (device == Device::kCuda && cuda != nullptr) {
        // The tensor's GPU need not be the current one.
        const torch::stable::accelerator::DeviceGuard guard(device_index(on));
        cuda(params, current_cuda_stream(on));
    } else {
        raise_unsupported_device(op, on, cuda != nullptr);
    }
}

/// Gives `params` the scratch of the CUDA kernels, from torch's allocator; none on the CPU. Checks
/// `params` first. `bytes` tells how much; nullptr where the library is built without CUDA. The
/// result owns the memory: it lives until the kernels are in the stream.
template <typename Params>
OptionalTensor make_scratch(const TorchTensor& on, Params& params,
                            std::type_identity_t<int64_t (*)(const Params&)> bytes) {
    if (bytes == nullptr || view(on).device != Device::kCuda) return std::nullopt;
    check(params);
    // What is needed may depend on the GPU, and the tensor's need not be the current one.
    const torch::stable::accelerator::DeviceGuard guard(device_index(on));
    TorchTensor scratch = make_empty(on, {bytes(params)}, ScalarType::Byte);
    params.scratch = scratch.data_ptr();
    return scratch;
}

}  // namespace lemo::torch_api

/// The CUDA entry point of an op, or nullptr where the library is built without CUDA.
#if defined(LEMO_WITH_CUDA)
#define LEMO_CUDA_KERNEL(function) (&(function))
#else
#define LEMO_CUDA_KERNEL(function) nullptr
#endif
