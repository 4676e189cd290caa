// The kernels of swiglu: element by element, 16-byte accesses, bound by bandwidth.
#pragma once

#include "common/fp8.h"
#include "common/vector.h"
#include "lemo/blocks.h"
#include "lemo/grid.h"

namespace lemo::cuda::swiglu::portable {

constexpr int kThreads = 256;
// Vectors of each operand that a thread loads before it stores the first.
constexpr int kInFlight = 2;

/// 1 / (1 + exp(-x)). Both intrinsics err by a few units in the last place of fp32, which bf16 and
/// fp16 round away; exp overflows to infinity where the sigmoid is 0.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

/// A thread's vectors lie a block of threads apart. `load(i, width)` gives what starts at element
/// i, `use(i, width, loaded)` takes it; of the one vector that n cuts, element by element.
template <int kWidth, typename Load, typename Use>
__device__ __forceinline__ void walk(int64_t n, Load&& load, Use&& use) {
    constexpr Int<kWidth> width;
    const int64_t first = (int64_t{blockIdx.x} * kInFlight * kThreads + threadIdx.x) * kWidth;
    decltype(load(first, width)) loaded[kInFlight];
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kInFlight; ++v) {
        const int64_t i = first + v * kThreads * kWidth;
        if (i + kWidth <= n) loaded[v] = load(i, width);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kInFlight; ++v) {
        const int64_t i = first + v * kThreads * kWidth;
        if (i + kWidth <= n) {
            use(i, width, loaded[v]);
        } else {
            constexpr Int<1> one;
            for (int64_t e = i; e < n; ++e) use(e, one, load(e, one));
        }
    }
}

template <typename T, int n>
struct SwigluVectors {
    cutlass::AlignedArray<T, n> gate, up;
};

template <typename T, int kWidth>
__global__ void
__launch_bounds__(kThreads)
swiglu_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y, int64_t n) {
    const auto load = [&]<int w>(int64_t i, Int<w>) {
        return SwigluVectors<T, w>{load_vector<w>(gate + i), load_vector<w>(up + i)};
    };
    walk<kWidth>(n, load, [&]<int w>(int64_t i, Int<w>, SwigluVectors<T, w> at) {
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < w; ++e) {
            const float g = float(at.gate[e]);
            at.gate[e] = T(g * sigmoid(g) * float(at.up[e]));
        }
        store_vector<w>(y + i, at.gate);
    });
}

// A thread block takes a row where rows get scales, and its threads hold it until they are known.
constexpr int kRowThreads = 256;
constexpr int kMostVectors = 8;

/// y, and y in e4m3, of rows of at most kRowThreads * kVectors vectors.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kRowThreads)
swiglu_rows_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y,
                   uint8_t* __restrict__ values, float* __restrict__ scales, int64_t columns) {
    constexpr int w = 16 / static_cast<int>(sizeof(T));
    __shared__ float scratch[kReduceScratch];
    const int64_t first = int64_t{blockIdx.x} * columns;
    cutlass::AlignedArray<T, w> held[kVectors], factor[kVectors];
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        const int64_t i = (int64_t{v} * kRowThreads + threadIdx.x) * w;
        if (i >= columns) continue;
        held[v] = load_vector<w>(gate + first + i);
        factor[v] = load_vector<w>(up + first + i);
    }
    float largest = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        const int64_t i = (int64_t{v} * kRowThreads + threadIdx.x) * w;
        if (i >= columns) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < w; ++e) {
            const float g = float(held[v][e]);
            held[v][e] = T(g * sigmoid(g) * float(factor[v][e]));
            // Of what is stored, so that the bits are those of fp8_rows.
            largest = fmaxf(largest, fabsf(float(held[v][e])));
        }
        store_vector<w>(y + first + i, held[v]);
    }
    const Fp8Scale found = Fp8Scale::of<kRowThreads>(largest, scratch);
    if (threadIdx.x == 0) scales[blockIdx.x] = found.scale;
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        const int64_t i = (int64_t{v} * kRowThreads + threadIdx.x) * w;
        if (i >= columns) continue;
        store_e4m3<w>(values + first + i,
                      [&](int e) { return float(held[v][e]) * found.inverse; });
    }
}

/// The same for rows of any length, anywhere: what a thread stored it reads again.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
swiglu_any_rows_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* y,
                       uint8_t* __restrict__ values, float* __restrict__ scales, int64_t columns) {
    __shared__ float scratch[kReduceScratch];
    const int64_t first = int64_t{blockIdx.x} * columns;
    float largest = 0;
    for (int64_t i = first + threadIdx.x; i < first + columns; i += kRowThreads) {
        const float g = float(gate[i]);
        const T product = T(g * sigmoid(g) * float(up[i]));
        y[i] = product;
        largest = fmaxf(largest, fabsf(float(product)));
    }
    const Fp8Scale found = Fp8Scale::of<kRowThreads>(largest, scratch);
    if (threadIdx.x == 0) scales[blockIdx.x] = found.scale;
    for (int64_t i = first + threadIdx.x; i < first + columns; i += kRowThreads) {
        store_e4m3<1>(values + i, [&](int) { return float(y[i]) * found.inverse; });
    }
}

template <typename T, int n>
struct SwigluBackwardVectors {
    cutlass::AlignedArray<T, n> dout, gate, up;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
swiglu_backward_kernel(const T* __restrict__ dout, T* __restrict__ gate, T* __restrict__ up,
                       int64_t n) {
    const auto load = [&]<int w>(int64_t i, Int<w>) {
        return SwigluBackwardVectors<T, w>{load_vector<w>(dout + i),
                                     load_vector<w>(gate + i), load_vector<w>(up + i)};
    };
    walk<kWidth>(n, load, [&]<int w>(int64_t i, Int<w>, SwigluBackwardVectors<T, w> at) {
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < w; ++e) {
            const float d = float(at.dout[e]), g = float(at.gate[e]), u = float(at.up[e]);
            const float s = sigmoid(g);
            at.gate[e] = T(d * u * s * (1.0f + g * (1.0f - s)));
            at.up[e] = T(d * g * s);
        }
        store_vector<w>(gate + i, at.gate);
        store_vector<w>(up + i, at.up);
    });
}

/// Thread blocks for n elements, `width` at a time.
inline unsigned grid_of(const char* op, int64_t n, int width) {
    return grid_x(op, "gate", ceil_div<int64_t>(n, int64_t{kInFlight} * kThreads * width));
}

}  // namespace lemo::cuda::swiglu::portable
