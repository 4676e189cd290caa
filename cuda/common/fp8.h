// Rows in e4m3: scales by the threads of a block, and stores.
#pragma once

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cutlass/array.h>

#include "common/reduce.h"
#include "lemo/fp8.h"

namespace lemo::cuda {

/// What turns a row into e4m3: its scale, and the inverse that its values are multiplied with.
struct Fp8Scale {
    float scale, inverse;

    /// `largest`: this thread's largest magnitude. All threads take part.
    template <int kThreads>
    __device__ __forceinline__ static Fp8Scale of(float largest, float* scratch) {
        const float magnitude = fmaxf(block_max<kThreads>(largest, scratch), kFp8LeastMagnitude);
        return {__fdiv_rn(magnitude, kFp8Largest), __fdiv_rn(kFp8Largest, magnitude)};
    }
};

__device__ __forceinline__ uint8_t to_e4m3(float value) {
    return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

/// Four of them as one word, the first in its lowest byte.
__device__ __forceinline__ uint32_t to_e4m3(float a, float b, float c, float d) {
    const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
}

/// Stores `value(e)` for e in [0, n) in one access; n is 1 or a multiple of 4.
template <int n, typename Value>
__device__ __forceinline__ void store_e4m3(uint8_t* to, Value&& value) {
    if constexpr (n == 1) {
        *to = to_e4m3(value(0));
    } else {
        static_assert(n % 4 == 0, "whole words");
        cutlass::AlignedArray<uint32_t, n / 4> words;
        CUTLASS_PRAGMA_UNROLL
        for (int w = 0; w < n / 4; ++w) {
            words[w] = to_e4m3(value(4 * w), value(4 * w + 1), value(4 * w + 2), value(4 * w + 3));
        }
        *reinterpret_cast<cutlass::AlignedArray<uint32_t, n / 4>*>(to) = words;
    }
}

}  // namespace lemo::cuda
