// The portable tier, for compute capability 8.0 and newer; each direction and pair of head sizes is
// instantiated in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "lemo/segment_attention.h"

namespace lemo::cuda::segment_attention::portable {

// `Element` is cutlass::bfloat16_t or cutlass::half_t; `kHeadDim` and `kValueDim` are the head
// sizes of keys and of values: 64 and 64, 128 and 128, 192 and 128, or 256 and 256. Smaller sizes
// take the next larger ones, whose surplus columns are read as zeros.

/// Shared memory of a thread block that the large tiles of the backward pass take.
template <int kHeadDim>
inline constexpr int kLargeSharedBytes = (kHeadDim == 256 ? 178 : 162) * 1024;

template <typename Element, int kHeadDim, int kValueDim>
struct ForwardPass {
    static int64_t scratch_bytes(const SegmentAttentionParams& params);
    static void launch(const SegmentAttentionParams& params, cudaStream_t stream);
};

/// With `small`, the tiles that fit the 99 KiB of shared memory of compute capability 8.6 and 8.9.
template <typename Element, int kHeadDim, int kValueDim>
struct BackwardPass {
    static int64_t scratch_bytes(const SegmentAttentionBackwardParams& params, bool small);
    static void launch(const SegmentAttentionBackwardParams& params, bool small,
                       cudaStream_t stream);
};

}  // namespace lemo::cuda::segment_attention::portable
