// block_scores: how much later queries ask of each block of keys; the labels of the predictors.
#pragma once

#include "lemo/tensor.h"

namespace lemo {

/// For rows i > j of one sequence S[i, j] = scale * mean over heads of max(q_i . k_j, 0); I[m, n]
/// is the maximum of S over a pair of blocks (0 where there is none); score[n] is the mean of
/// I[m, n] over the blocks m >= n of the sequence.
struct BlockScoresParams {
    Tensor q;             // [T, Hq, D] float
    Tensor k;             // [T, Hk, D] of q's dtype; Hq is a multiple of Hk
    Tensor block_starts;  // [B+1] int32
    Tensor cu_blocks;     // [N+1] int32
    double scale;         // positive
    Tensor scores;        // [B] float32, written
};

void check(const BlockScoresParams& params);

void block_scores_cpu(const BlockScoresParams& params);

}  // namespace lemo
