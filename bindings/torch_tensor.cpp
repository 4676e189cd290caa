#include "torch_tensor.h"

#include <dlfcn.h>

#include <stdexcept>
#include <vector>

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
    return torch::stable::contiguous(tensor);
}

OptionalTensor to_contiguous(const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(to_contiguous(*tensor)) : std::nullopt;
}

TorchTensor to_aligned(const TorchTensor& tensor) {
    const TorchTensor contiguous = to_contiguous(tensor);
    const bool aligned = reinterpret_cast<uintptr_t>(contiguous.data_ptr()) % 16 == 0;
    return aligned ? contiguous : torch::stable::clone(contiguous);
}

TorchTensor make_empty(const TorchTensor& like, std::initializer_list<int64_t> shape,
                       ScalarType dtype) {
    const std::vector<int64_t> sizes(shape);
    return torch::stable::new_empty(like, sizes, dtype);
}

TorchTensor make_empty(const TorchTensor& like, std::initializer_list<int64_t> shape) {
    return make_empty(like, shape, like.scalar_type());
}

TorchTensor make_zeros(const TorchTensor& like, std::initializer_list<int64_t> shape,
                       ScalarType dtype) {
    const std::vector<int64_t> sizes(shape);
    return torch::stable::new_zeros(like, sizes, dtype);
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
