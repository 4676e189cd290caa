// The Hopper kernel of block_scores, for compute capability 9.0; in a build with LEMO_WITH_HOPPER.
#pragma once

#include <cuda_runtime.h>

#include "block_scores/plan.h"

namespace lemo::cuda::block_scores::hopper {

/// Sums all items into ScoresScratch::parts.
void launch(const ScoresArguments& args, const BlockScoresParams& params, cudaStream_t stream);

}  // namespace lemo::cuda::block_scores::hopper
