#include "torch_tensor.h"

#include <dlfcn.h>

#include <iomanip>
#include <sstream>
#include <stdexcept>
#include <vector>

/// The message of libtorch's last error in this thread. libtorch has it from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace lemo::torch_api {
namespace {

DType to_dtype(ScalarType type) {
    switch (type) {
        case ScalarType::Float: return DType::kFloat32;
        case ScalarType::BFloat16: return DType::kBFloat16;
        case ScalarType::Half: return DType::kFloat16;
        case ScalarType::Int: return DType::kInt32;
        case ScalarType::Long: return DType::kInt64;
        default: return DType::kOther;
    }
}

// torch's own macro for this changed its name between 2.11 and 2.13.
void require_success(AOTITorchError status) {
    if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error("a call into libtorch failed");
}

Device to_device(const TorchTensor& tensor) {
    int32_t type = 0;
    require_success(aoti_torch_get_device_type(tensor.get(), &type));
    if (type == aoti_torch_device_type_cpu()) return Device::kCpu;
    if (type == aoti_torch_device_type_cuda()) return Device::kCuda;
    return Device::kOther;
}

/// Why the last call into libtorch failed, in one line; empty where torch only logs it.
std::string last_reason() {
    if (torch_exception_get_what_without_backtrace == nullptr) return "";
    const std::string text = torch_exception_get_what_without_backtrace();
    return text.substr(0, text.find('\n'));
}

[[noreturn]] void raise_not_allocated(const std::vector<int64_t>& sizes, ScalarType dtype,
                                      const StableDevice& device) {
    const auto element = aoti_torch_dtype_element_size(static_cast<int32_t>(dtype));
    auto bytes = static_cast<double>(element);  // their number may be beyond every integer
    std::string shape;
    for (const int64_t size : sizes) {
        bytes *= static_cast<double>(size);
        shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    }
    std::ostringstream text;
    text << "cannot allocate " << std::fixed << std::setprecision(0) << bytes
         << " bytes for a tensor [" << shape << "] on " << (device.is_cpu() ? "cpu" : "cuda");
    if (device.has_index() && !device.is_cpu()) text << ":" << static_cast<int>(device.index());
    const std::string reason = last_reason();
    if (!reason.empty()) text << ": " << reason;
    const bool no_memory = reason.empty() || reason.find("out of memory") != std::string::npos ||
                           reason.find("can't allocate memory") != std::string::npos;
    // A GPU that failed before fails here, too.
    if (!no_memory) throw std::runtime_error(text.str());
    throw Error(device.is_cpu() ? ErrorKind::kMemory : ErrorKind::kDeviceMemory, text.str());
}

/// Every tensor that the bindings make: uninitialised and contiguous.
TorchTensor allocate(const TorchTensor& like, const std::vector<int64_t>& sizes, ScalarType dtype,
                     const StableDevice& device) {
    try {
        return torch::stable::new_empty(like, sizes, dtype, std::nullopt, device);
    } catch (const std::exception&) {
        raise_not_allocated(sizes, dtype, device);
    }
}

TorchTensor copy_to(const TorchTensor& tensor, const StableDevice& device) {
    const auto sizes = tensor.sizes();
    TorchTensor copy = allocate(tensor, {sizes.begin(), sizes.end()}, tensor.scalar_type(), device);
    torch::stable::copy_(copy, tensor);
    return copy;
}

}  // namespace

Tensor view(const TorchTensor& tensor) {
    if (tensor.dim() > kMaxDims) {
        throw Error(ErrorKind::kValue, "expected tensors of at most " + std::to_string(kMaxDims) +
                                           " dimensions, got " + std::to_string(tensor.dim()));
    }
    Tensor result;
    result.data = tensor.data_ptr();
    result.dtype = to_dtype(tensor.scalar_type());
    result.device = to_device(tensor);
    if (result.device == Device::kCuda) result.device_index = device_index(tensor);
    result.ndim = static_cast<int>(tensor.dim());
    for (int i = 0; i < result.ndim; ++i) {
        result.shape[static_cast<size_t>(i)] = tensor.size(i);
        result.stride[static_cast<size_t>(i)] = tensor.stride(i);
    }
    return result;
}

Tensor view(const OptionalTensor& tensor) { return tensor ? view(*tensor) : Tensor{}; }

TorchTensor to_contiguous(const TorchTensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    int32_t layout = 0;
    require_success(aoti_torch_get_layout(tensor.get(), &layout));
    if (layout != aoti_torch_layout_strided()) {
        throw Error(ErrorKind::kType, "expected dense tensors, got one of another layout (sparse)");
    }
    return copy_to(tensor, tensor.device());
}

OptionalTensor to_contiguous(const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(to_contiguous(*tensor)) : std::nullopt;
}

TorchTensor to_aligned(const TorchTensor& tensor) {
    const TorchTensor contiguous = to_contiguous(tensor);
    const bool aligned = reinterpret_cast<uintptr_t>(contiguous.data_ptr()) % 16 == 0;
    return aligned ? contiguous : copy_to(contiguous, contiguous.device());
}

TorchTensor make_empty(const TorchTensor& like, std::initializer_list<int64_t> shape,
                       ScalarType dtype) {
    return allocate(like, shape, dtype, like.device());
}

TorchTensor make_empty(const TorchTensor& like, std::initializer_list<int64_t> shape) {
    return make_empty(like, shape, like.scalar_type());
}

TorchTensor copy_to_host(const TorchTensor& tensor) {
    return copy_to(tensor, StableDevice(torch::headeronly::DeviceType::CPU));
}

int32_t device_index(const TorchTensor& on) {
    int32_t index = 0;
    require_success(aoti_torch_get_device_index(on.get(), &index));
    return index;
}

void* current_cuda_stream(const TorchTensor& on) {
    // The one CUDA symbol that the bindings need lives in libtorch_cuda, which a CPU build of torch
    // lacks. Looking it up in the library torch has loaded lets one liblemo_ops.so serve both.
    using GetStream = AOTITorchError (*)(int32_t, void**);
    static const GetStream get_stream = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
        return reinterpret_cast<GetStream>(symbol);
    }();
    if (get_stream == nullptr) {
        throw Error(ErrorKind::kUnsupported,
                    "this torch gives no CUDA stream: expected a torch "
                    "built with CUDA whose libtorch_cuda.so is loaded");
    }
    void* stream = nullptr;
    require_success(get_stream(device_index(on), &stream));
    return stream;
}

void raise_unsupported_device(const char* op, const TorchTensor& on, bool has_cuda) {
    throw Error(ErrorKind::kUnsupported, std::string(op) + ": no kernel for " + describe(view(on)) +
                                             "; supported devices of this build: cpu" +
                                             (has_cuda ? ", cuda" : ""));
}

}  // namespace lemo::torch_api
