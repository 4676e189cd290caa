// Vector loads and stores of rows in global memory.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include <cutlass/array.h>

namespace lemo::cuda {

template <int value>
using Int = std::integral_constant<int, value>;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

/// Whether rows of `row_bytes` bytes at these addresses can be accessed 16 bytes at a time. A view
/// into the middle of a tensor need not start on such an address.
inline bool vectorisable(int64_t row_bytes, std::initializer_list<const void*> addresses) {
    bool aligned = row_bytes % 16 == 0;
    for (const void* address : addresses) {
        aligned = aligned && reinterpret_cast<uintptr_t>(address) % 16 == 0;
    }
    return aligned;
}

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
