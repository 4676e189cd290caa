// The Hopper tier, for compute capability 9.0; each direction, pair of head sizes and kind of
// scores is instantiated in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "lemo/segment_attention.h"

namespace lemo::cuda::segment_attention::hopper {

// `Element` is cutlass::bfloat16_t or cutlass::half_t; `kHeadDim` and `kValueDim` are the head
// sizes of keys and of values, or the next larger ones, whose surplus columns are read as zeros.
// With `kCapped` the scores have a softcap.

/// 64, 128 and 256 for both, and 192 for keys with 128 for values; with `kCapped` 128 and 256.
template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
struct ForwardPass {
    static int64_t scratch_bytes(const SegmentAttentionParams& params);
    static void launch(const SegmentAttentionParams& params, cudaStream_t stream);
};

/// The same pairs.
template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
struct BackwardPass {
    static int64_t scratch_bytes(const SegmentAttentionBackwardParams& params);
    static void launch(const SegmentAttentionBackwardParams& params, cudaStream_t stream);
};

}  // namespace lemo::cuda::segment_attention::hopper
