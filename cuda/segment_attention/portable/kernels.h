// The portable tier, for compute capability 8.0 and newer; each direction and head size is
// instantiated in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "lemo/segment_attention.h"

namespace lemo::cuda::segment_attention::portable {

// `Element` is cutlass::bfloat16_t or cutlass::half_t, `kHeadDim` 64 or 128: the head size, or the
// next larger one, whose surplus columns are read as zeros.

template <typename Element, int kHeadDim>
struct ForwardPass {
    static int64_t scratch_bytes(const SegmentAttentionParams& params);
    static void launch(const SegmentAttentionParams& params, cudaStream_t stream);
};

/// With `small`, the tiles that fit the 99 KiB of shared memory of compute capability 8.6 and 8.9.
template <typename Element, int kHeadDim>
struct BackwardPass {
    static int64_t scratch_bytes(const SegmentAttentionBackwardParams& params, bool small);
    static void launch(const SegmentAttentionBackwardParams& params, bool small,
                       cudaStream_t stream);
};

}  // namespace lemo::cuda::segment_attention::portable
