// swiglu on CUDA: element by element, 16-byte accesses, bound by bandwidth.
#include "lemo/swiglu.h"

#include "common/launch.h"
#include "common/vector.h"

namespace lemo {
namespace {

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
    constexpr cuda::Int<kWidth> width;
    const int64_t first =
        (int64_t{blockIdx.x} * kInFlight * kThreads + threadIdx.x) * kWidth;
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
            constexpr cuda::Int<1> one;
            for (int64_t e = i; e < n; ++e) use(e, one, load(e, one));
        }
    }
}

template <typename T, int n>
struct ForwardVectors {
    cutlass::AlignedArray<T, n> gate, up;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
swiglu_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y, int64_t n) {
    const auto load = [&]<int w>(int64_t i, cuda::Int<w>) {
        return ForwardVectors<T, w>{cuda::load_vector<w>(gate + i), cuda::load_vector<w>(up + i)};
    };
    walk<kWidth>(n, load, [&]<int w>(int64_t i, cuda::Int<w>, ForwardVectors<T, w> at) {
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < w; ++e) {
            const float g = float(at.gate[e]);
            at.gate[e] = T(g * sigmoid(g) * float(at.up[e]));
        }
        cuda::store_vector<w>(y + i, at.gate);
    });
}

template <typename T, int n>
struct BackwardVectors {
    cutlass::AlignedArray<T, n> dout, gate, up;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
swiglu_backward_kernel(const T* __restrict__ dout, T* __restrict__ gate, T* __restrict__ up,
                       int64_t n) {
    const auto load = [&]<int w>(int64_t i, cuda::Int<w>) {
        return BackwardVectors<T, w>{cuda::load_vector<w>(dout + i),
                                     cuda::load_vector<w>(gate + i), cuda::load_vector<w>(up + i)};
    };
    walk<kWidth>(n, load, [&]<int w>(int64_t i, cuda::Int<w>, BackwardVectors<T, w> at) {
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < w; ++e) {
            const float d = float(at.dout[e]), g = float(at.gate[e]), u = float(at.up[e]);
            const float s = sigmoid(g);
            at.gate[e] = T(d * u * s * (1.0f + g * (1.0f - s)));
            at.up[e] = T(d * g * s);
        }
        cuda::store_vector<w>(gate + i, at.gate);
        cuda::store_vector<w>(up + i, at.up);
    });
}

unsigned grid_of(int64_t n, int width) {
    return static_cast<unsigned>(ceil_div<int64_t>(n, int64_t{kInFlight} * kThreads * width));
}

}  // namespace

void swiglu_cuda(const SwigluParams& params, void* stream) {
    const int64_t n = params.gate.num_elements();
    if (n == 0) return;
    cuda::dispatch_float(params.gate.dtype, [&]<typename T>(T) {
        constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
        const bool aligned =
            cuda::vectorisable(0, {params.gate.data, params.up.data, params.y.data});
        const auto kernel = aligned ? swiglu_kernel<T, kWidth> : swiglu_kernel<T, 1>;
        kernel<<<grid_of(n, aligned ? kWidth : 1), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(
            params.gate.as<const T>(), params.up.as<const T>(), params.y.as<T>(), n);
    });
    cuda::check_launch("swiglu");
}

void swiglu_backward_cuda(const SwigluBackwardParams& params, void* stream) {
    const int64_t n = params.gate.num_elements();
    if (n == 0) return;
    cuda::dispatch_float(params.gate.dtype, [&]<typename T>(T) {
        constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
        const bool aligned =
            cuda::vectorisable(0, {params.dout.data, params.gate.data, params.up.data});
        const auto kernel = aligned ? swiglu_backward_kernel<T, kWidth>
                                    : swiglu_backward_kernel<T, 1>;
        kernel<<<grid_of(n, aligned ? kWidth : 1), kThreads, 0,
                 static_cast<cudaStream_t>(stream)>>>(
            params.dout.as<const T>(), params.gate.as<T>(), params.up.as<T>(), n);
    });
    cuda::check_launch("swiglu_backward");
}

}  // namespace lemo
