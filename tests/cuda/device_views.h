// Arrays on the GPU for the C++ GPU tests and benchmarks. A failed CUDA call throws.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "lemo/tensor.h"
#include "views.h"

namespace lemo::testing {

inline void require(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

/// Waits for everything on the GPU, and throws what went wrong there.
inline void synchronize() { require(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

/// `n` elements in an allocation of their own, so that memcheck sees every access beyond its ends.
template <typename T>
class DeviceArray {
public:
    /// Not initialised, so that initcheck sees a kernel read what nothing has written.
    explicit DeviceArray(size_t n) : n_(n) {
        require(cudaMalloc(&data_, std::max<size_t>(n, 1) * sizeof(T)), "cudaMalloc");
    }

    explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
        upload(values);
    }

    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;
    ~DeviceArray() { cudaFree(data_); }

    void upload(const std::vector<T>& values) {
        if (values.size() != n_) throw std::runtime_error("upload of another size");
        require(cudaMemcpy(data_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "upload");
    }

    /// Waits for the GPU first.
    std::vector<T> download() const {
        synchronize();
        std::vector<T> values(n_);
        require(cudaMemcpy(values.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost),
                "download");
        return values;
    }

    void fill_zero() const { require(cudaMemset(data_, 0, n_ * sizeof(T)), "cudaMemset"); }

    int64_t size() const { return static_cast<int64_t>(n_); }
    T* data() const { return static_cast<T*>(data_); }

    /// A contiguous view with this shape.
    Tensor view(const std::vector<int64_t>& shape) const {
        Tensor tensor = contiguous_view(data_, dtype_of<T>(), Device::kCuda, shape);
        if (tensor.num_elements() != static_cast<int64_t>(n_)) {
            throw std::runtime_error("view of another size than the array's");
        }
        return tensor;
    }

private:
    void* data_ = nullptr;
    size_t n_ = 0;
};

/// Scratch of a call: as many bytes as a `x_scratch_bytes` says.
class Scratch {
public:
    explicit Scratch(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {}
    void* data() const { return bytes_.data(); }

private:
    DeviceArray<unsigned char> bytes_;
};

}  // namespace lemo::testing
