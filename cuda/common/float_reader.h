// Small shared operands of any float dtype.
#pragma once

#include <cstdint>

#include <cutlass/array.h>
#include <cutlass/numeric_types.h>

#include "common/vector.h"
#include "lemo/tensor.h"

namespace lemo::cuda {

/// A read-only array whose storage type is known at run time, as floats: for small operands that
/// many rows share (weights, tables), where a template parameter would only multiply kernels.
struct FloatReader {
    const void* data;
    DType dtype;

    explicit FloatReader(const Tensor& tensor)
        : data(tensor ? tensor.data : nullptr), dtype(tensor.dtype) {}

    /// Elements i to i + n; all zero where there is no vector.
    template <int n>
    __device__ __forceinline__ cutlass::Array<float, n> load(int64_t i) const {
        cutlass::Array<float, n> values;
        values.clear();
        if (data == nullptr) return values;
        switch (dtype) {
            case DType::kBFloat16: convert<cutlass::bfloat16_t>(values, i); break;
            case DType::kFloat16: convert<cutlass::half_t>(values, i); break;
            default: convert<float>(values, i);
        }
        return values;
    }

private:
    template <typename T, int n>
    __device__ __forceinline__ void convert(cutlass::Array<float, n>& values, int64_t i) const {
        // At most 16 bytes an access, whatever the caller's type makes n.
        constexpr int kMost = 16 / static_cast<int>(sizeof(T));
        constexpr int kStep = n < kMost ? n : kMost;
        CUTLASS_PRAGMA_UNROLL
        for (int first = 0; first < n; first += kStep) {
            const auto part = load_vector<kStep>(static_cast<const T*>(data) + i + first);
            CUTLASS_PRAGMA_UNROLL
            for (int e = 0; e < kStep; ++e) values[first + e] = float(part[e]);
        }
    }
};

}  // namespace lemo::cuda
