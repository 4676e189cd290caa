// Views of std::vector for the C++ tests.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "convert.h"
#include "lemo/tensor.h"

namespace lemo::testing {

template <typename T>
constexpr DType dtype_of() {
    if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
    if constexpr (std::is_same_v<T, cpu::BFloat16>) return DType::kBFloat16;
    if constexpr (std::is_same_v<T, cpu::Float16>) return DType::kFloat16;
    if constexpr (std::is_same_v<T, int32_t>) return DType::kInt32;
    if constexpr (std::is_same_v<T, int64_t>) return DType::kInt64;
    return DType::kOther;
}

inline Tensor contiguous_view(void* data, DType dtype, Device device,
                              const std::vector<int64_t>& shape) {
    Tensor tensor;
    tensor.data = data;
    tensor.dtype = dtype;
    tensor.device = device;
    tensor.ndim = static_cast<int>(shape.size());
    size_t i = 0;
    for (const int64_t size : shape) tensor.shape[i++] = size;
    int64_t stride = 1;
    for (i = shape.size(); i-- > 0;) {
        tensor.stride[i] = stride;
        stride *= tensor.shape[i];
    }
    return tensor;
}

/// A contiguous view of `values` with this shape.
template <typename T>
Tensor view(std::vector<T>& values, const std::vector<int64_t>& shape) {
    return contiguous_view(values.data(), dtype_of<T>(), Device::kCpu, shape);
}

}  // namespace lemo::testing
