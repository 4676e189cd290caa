// The kernels of block_scores, each of which sums all items into Workspace::parts.
#pragma once

#include <cuda_runtime.h>

#include "block_scores/plan.h"

namespace lemo::block_scores {

/// `dtype` is bfloat16 or float16.
void launch_portable(const Arguments& args, DType dtype, cudaStream_t stream);

/// For compute capability 9.0; in a build with LEMO_WITH_HOPPER.
void launch_hopper(const Arguments& args, const BlockScoresParams& params, cudaStream_t stream);

}  // namespace lemo::block_scores
