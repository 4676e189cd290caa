// Bisection in ascending arrays, on the device.
#pragma once

#include <cstdint>

namespace lemo::cuda {

/// How many of the indices [0, count) come before the first for which `holds` does not hold; it
/// holds for none behind that one.
template <typename Holds>
__device__ __forceinline__ int partition_point(int count, Holds&& holds) {
    int first = 0;
    while (count > 0) {
        const int half = count / 2;
        if (holds(first + half)) {
            first += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return first;
}

/// Number of entries of the ascending `values` [count] that are at most `value`.
__device__ __forceinline__ int count_up_to(const int32_t* values, int count, int value) {
    return partition_point(count, [&](int i) { return values[i] <= value; });
}

/// The part that holds `index`, of `count` >= 1 parts that begin at `firsts` [count], ascending
/// from at most `index`. Empty parts begin where the next one does, and hold nothing.
template <typename Index>
__device__ __forceinline__ Index part_of(const int32_t* firsts, Index count, int64_t index) {
    Index part = 0;
    for (Index above = count; above - part > 1;) {
        const Index middle = (part + above) / 2;
        (firsts[middle] <= index ? part : above) = middle;
    }
    return part;
}

}  // namespace lemo::cuda
