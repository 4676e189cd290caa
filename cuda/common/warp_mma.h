// The warp-wide instructions of the portable tiers, by CuTe's atoms: loads of fragments, and the
// mma of m16n8k16 with fp32 accumulators.
//
// What a lane holds for one mma: of A [16, 16] rows lane / 4 and lane / 4 + 8; of B [8, 16], which
// has a row for each column of the result, row lane / 4; of the accumulators [16, 8] rows lane / 4
// (elements 0 and 1) and lane / 4 + 8 (2 and 3), columns lane % 4 * 2 and the one after it.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

#include <cutlass/numeric_types.h>

#include <type_traits>

namespace lemo::cuda {

/// Four 8 x 8 matrices of 2-byte elements: lane l gives the address of row l % 8 of matrix l / 8
/// (16 bytes) and gets elements 2 * (l % 4), + 1 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
    cute::SM75_U32x4_LDSM_N::copy(*static_cast<const cute::uint128_t*>(row), to[0], to[1], to[2],
                                  to[3]);
}

/// accumulators += a b^T.
template <typename T>
__device__ __forceinline__ void warp_mma(float (&accumulators)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    using Atom = std::conditional_t<std::is_same_v<T, cutlass::bfloat16_t>,
                                    cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                    cute::SM80_16x8x16_F32F16F16F32_TN>;
    auto& c = accumulators;
    Atom::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
}

}  // namespace lemo::cuda
