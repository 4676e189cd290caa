// The vocabulary of every op's contract: element types, devices and plain strided views. std only.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace lemo {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kInt32, kInt64, kOther };
enum class Device : uint8_t { kCpu, kCuda, kOther };

inline constexpr int kMaxDims = 4;

/// A borrowed view of an array. Shapes and strides count elements; the owner outlives the call.
/// `ndim == kAbsent` marks an optional argument that was not given.
struct Tensor {
    static constexpr int kAbsent = -1;

    void* data = nullptr;
    DType dtype = DType::kOther;
    Device device = Device::kOther;
    int ndim = kAbsent;
    std::array<int64_t, kMaxDims> shape{};
    std::array<int64_t, kMaxDims> stride{};
    int device_index = 0;  // which GPU; 0 on the CPU

    bool given() const { return ndim != kAbsent; }
    explicit operator bool() const { return given(); }

    int64_t size(int dim) const { return shape[static_cast<size_t>(dim)]; }

    int64_t num_elements() const {
        int64_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= size(i);
        return n;
    }

    bool is_empty() const {
        for (int i = 0; i < ndim; ++i) {
            if (size(i) == 0) return true;
        }
        return false;
    }

    bool is_contiguous() const {
        if (is_empty()) return true;
        int64_t expected = 1;
        for (int i = ndim - 1; i >= 0; --i) {
            if (size(i) != 1 && stride[static_cast<size_t>(i)] != expected) return false;
            expected *= size(i);
        }
        return true;
    }

    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

inline bool is_float(DType dtype) {
    return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

/// Bytes of an element.
inline int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::kBFloat16:
        case DType::kFloat16: return 2;
        case DType::kInt64: return 8;
        default: return 4;
    }
}

inline const char* name(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return "float32";
        case DType::kBFloat16: return "bfloat16";
        case DType::kFloat16: return "float16";
        case DType::kInt32: return "int32";
        case DType::kInt64: return "int64";
        default: return "another dtype";
    }
}

inline const char* name(Device device) {
    switch (device) {
        case Device::kCpu: return "cpu";
        case Device::kCuda: return "cuda";
        default: return "another device";
    }
}

/// "float32 [3, 4] on cpu", for messages.
std::string describe(const Tensor& tensor);

}  // namespace lemo
