// The portable kernel of block_scores, for compute capability 8.0 and newer.
#pragma once

#include <cuda_runtime.h>

#include "block_scores/plan.h"

namespace lemo::cuda::block_scores::portable {

/// Sums all items into ScoresScratch::parts. `dtype` is bfloat16 or float16.
void launch(const ScoresArguments& args, DType dtype, cudaStream_t stream);

}  // namespace lemo::cuda::block_scores::portable
