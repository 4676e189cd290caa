// The exponential of the softmax kernels, and a hyperbolic tangent made of it.
#pragma once

namespace lemo::cuda {

/// 2^x in one instruction, to about two units in the last place; results that are subnormal become
/// zero.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// tanh(x / (2 log2 e)), to about 2e-7: absolute, not relative.
__device__ __forceinline__ float tanh_of_log2(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + exp2_approximate(x)));
    return fmaf(-2.0f, inverse, 1.0f);
}

}  // namespace lemo::cuda
