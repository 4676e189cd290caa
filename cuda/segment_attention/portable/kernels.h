// The portable tier, for compute capability 8.0 and newer; each direction and pair of head sizes is
// instantiated in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "lemo/segment_attention.h"

namespace lemo::cuda::segment_attention::portable {

// `Element` is cutlass::bfloat16_t or cutlass::half_t; `kHeadDim` and `kValueDim` are the head
// sizes of keys and of values, or the next larger ones, whose surplus columns are read as zeros.
// With `kCapped` the scores have a softcap: in kernels of their own, since the branch alone would
// make the others slower.

/// Shared memory of a thread block that the large tiles of the backward pass take.
constexpr int large_shared_bytes(int head_dim) { return (head_dim == 256 ? 178 : 162) * 1024; }

/// Whether keys and values have to be of one size: two strides instead of one take registers that
/// these kernels do not have. Others of these sizes take the next larger kernel.
template <int kHeadDim>
inline constexpr bool kOneSize = kHeadDim <= 128;

/// 64, 128 and 256 for both, and 192 for keys with 128 for values; with `kCapped` 128 and 256.
template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
struct ForwardPass {
    static int64_t scratch_bytes(const SegmentAttentionParams& params);
    static void launch(const SegmentAttentionParams& params, cudaStream_t stream);
};

/// Whether a backward pass has small tiles; where not, those of 256 take its place.
constexpr bool has_small_tiles(int head_dim, bool capped) {
    return head_dim == 256 || (head_dim <= 128 && !capped);
}

/// As ForwardPass. With `small`, the tiles that fit the 99 KiB of shared memory of compute
/// capability 8.6 and 8.9.
template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
struct BackwardPass {
    static int64_t scratch_bytes(const SegmentAttentionBackwardParams& params, bool small);
    static void launch(const SegmentAttentionBackwardParams& params, bool small,
                       cudaStream_t stream);
};

}  // namespace lemo::cuda::segment_attention::portable
