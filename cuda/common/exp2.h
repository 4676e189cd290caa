// The exponential of the softmax kernels.
#pragma once

namespace lemo::cuda {

/// 2^x in one instruction, to about two units in the last place; results that are subnormal become
/// zero.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace lemo::cuda
