// block_scores: exact scores, how much the queries of later blocks need the keys of each block.
#pragma once

#include <cstdint>
#include <string_view>

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
    // On a GPU: block_scores_scratch_bytes bytes of its memory, from a 256-byte boundary on.
    void* scratch = nullptr;
    std::string_view kernel = "auto";  // on CUDA also "portable" or "hopper"
};

void check(const BlockScoresParams& params);

void block_scores_cpu(const BlockScoresParams& params);

/// On CUDA q and k are bfloat16 or float16, with a head size of a multiple of 8 up to 128. "auto"
/// takes "hopper" on compute capability 9.0 where the build has that kernel, else "portable".
void block_scores_cuda(const BlockScoresParams& params, void* stream);

/// Scratch of a call on CUDA; `scratch` itself is not looked at.
int64_t block_scores_scratch_bytes(const BlockScoresParams& params);

}  // namespace lemo
