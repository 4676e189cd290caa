// The attention kernels for compute capability 9.0; each direction and head size is instantiated in
// a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "lemo/segment_attention.h"

namespace lemo::cuda::hopper {

/// Scratch of the forward pass before the plan's own: the counter of the work.
inline constexpr int kWorkBytes = 256;

// `Element` is cutlass::bfloat16_t or cutlass::half_t, `kHeadDim` 64 or 128: the head size, or the
// next larger one, whose surplus columns are read as zeros.

template <typename Element, int kHeadDim>
void launch_forward(const SegmentAttentionParams& params, cudaStream_t stream);

template <typename Element, int kHeadDim>
struct BackwardPass {
    static int64_t scratch_bytes(const SegmentAttentionBackwardParams& params);
    static void launch(const SegmentAttentionBackwardParams& params, cudaStream_t stream);
};

}  // namespace lemo::cuda::hopper
