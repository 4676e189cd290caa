// Vector loads and stores of rows in global memory.
#pragma once

#include <cutlass/array.h>

namespace lemo::cuda {

/// `n` elements as one access of at most 16 bytes; the address is a multiple of that size.
template <int n, typename T>
__device__ __forceinline__ cutlass::AlignedArray<T, n> load_vector(const T* from) {
    return *reinterpret_cast<const cutlass::AlignedArray<T, n>*>(from);
}

template <int n, typename T>
__device__ __forceinline__ void store_vector(T* to, const cutlass::AlignedArray<T, n>& value) {
    *reinterpret_cast<cutlass::AlignedArray<T, n>*>(to) = value;
}

}  // namespace lemo::cuda
