#include "lemo/swiglu.h"

#include "convert.h"
#include "exp2.h"
#include "fp8.h"
#include "lemo/check.h"
#include "multiversion.h"
#include "parallel.h"

namespace lemo {
namespace {

// Elements a thread should own before a second one pays.
constexpr int64_t kElementsPerThread = 16384;

/// 1 / (1 + exp(-x)).
[[gnu::always_inline]] inline float sigmoid(float x) {
    // exp2_fast takes at most 127; beyond, the sigmoid is 0 as far as fp32 can tell.
    const float power = -x * cpu::kLog2E;
    const float value = 1.0f / (1.0f + cpu::exp2_fast(power > 126.0f ? 126.0f : power));
    return power > 126.0f ? 0.0f : value;
}

template <typename T>
LEMO_MULTIVERSION void forward(const T* gate, const T* up, int64_t n, T* y) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float g = cpu::load(gate[i]);
        cpu::store(y + i, g * sigmoid(g) * cpu::load(up[i]));
    }
}

template <typename T>
LEMO_MULTIVERSION void backward(const T* dout, int64_t n, T* gate, T* up) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float d = cpu::load(dout[i]), g = cpu::load(gate[i]), u = cpu::load(up[i]);
        const float s = sigmoid(g);
        cpu::store(gate + i, d * u * s * (1.0f + g * (1.0f - s)));
        cpu::store(up + i, d * g * s);
    }
}

void check_same(const Checker& check, const char* argument, const Tensor& tensor,
                const Tensor& gate) {
    check.floating(argument, tensor, 2);
    check.same_dtype(argument, tensor, "gate", gate);
    check.same_device({{"gate", &gate}, {argument, &tensor}});
    check.dim(argument, tensor, 0, gate.size(0), "the rows of 'gate'");
    check.dim(argument, tensor, 1, gate.size(1), "the columns of 'gate'");
}

}  // namespace

void check(const SwigluParams& params) {
    const Checker check("swiglu");
    check.floating("gate", params.gate, 2);
    check_same(check, "up", params.up, params.gate);
    check_same(check, "y", params.y, params.gate);
}

void check(const SwigluFp8Params& params) {
    check(params.product);
    Checker("swiglu_fp8").typed("scales", params.scales, DType::kFloat32, 2);
}

void check(const SwigluBackwardParams& params) {
    const Checker check("swiglu_backward");
    check.floating("gate", params.gate, 2);
    check_same(check, "up", params.up, params.gate);
    check_same(check, "dout", params.dout, params.gate);
    check.separate("gate", params.gate, {{"up", &params.up}, {"dout", &params.dout}});
    check.separate("up", params.up, {{"dout", &params.dout}});
}

void swiglu_cpu(const SwigluParams& params) {
    cpu::dispatch_float(params.gate.dtype, [&]<typename T>(T) {
        const T *gate = params.gate.as<const T>(), *up = params.up.as<const T>();
        T* y = params.y.as<T>();
        cpu::parallel_ranges(params.gate.num_elements(), kElementsPerThread,
                             [&](int64_t first, int64_t end) {
                                 forward(gate + first, up + first, end - first, y + first);
                             });
    });
}

void swiglu_fp8_cpu(const SwigluFp8Params& params) {
    swiglu_cpu(params.product);
    const int64_t rows = params.product.y.size(0), columns = params.product.y.size(1);
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(columns, 1));
    cpu::dispatch_float(params.product.y.dtype, [&]<typename T>(T) {
        const T* y = params.product.y.as<const T>();
        cpu::parallel_ranges(rows, grain, [&](int64_t first, int64_t end) {
            for (int64_t r = first; r < end; ++r) {
                params.scales.as<float>()[r] = cpu::quantise_row(y + r * columns, nullptr, columns,
                                                                 params.values + r * columns);
            }
        });
    });
}

void swiglu_backward_cpu(const SwigluBackwardParams& params) {
    cpu::dispatch_float(params.gate.dtype, [&]<typename T>(T) {
        const T* dout = params.dout.as<const T>();
        T *gate = params.gate.as<T>(), *up = params.up.as<T>();
        cpu::parallel_ranges(params.gate.num_elements(), kElementsPerThread,
                             [&](int64_t first, int64_t end) {
                                 backward(dout + first, end - first, gate + first, up + first);
                             });
    });
}

}  // namespace lemo
