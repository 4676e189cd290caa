// block_scores: exact scores, how much the queries of later blocks need the keys of each block.
#pragma once

#include <algorithm>
#include <string_view>

#include "lemo/blocks.h"
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
    Tensor scratch{};     // [BlockScoresCut::scratch()] float32 on CUDA, absent on the CPU
    std::string_view kernel = "auto";  // on CUDA also "portable" or "hopper"
};

void check(const BlockScoresParams& params);

void block_scores_cpu(const BlockScoresParams& params);

/// On CUDA q and k are bfloat16 or float16, with a head size of a multiple of 8 up to 128. "auto"
/// takes "hopper" on compute capability 9.0 where the build has that kernel, else "portable".
void block_scores_cuda(const BlockScoresParams& params, void* stream);

/// How the CUDA kernels cut their work. The host knows sizes only, not where the blocks lie.
struct BlockScoresCut {
    // Rows of one product. A tile of queries is the whole blocks that fit, or one larger block.
    static constexpr int64_t kQueryRows = 128;
    static constexpr int64_t kKeyRows = 256;
    // The queries of a tile of keys are summed in at most this many parts: enough to occupy a GPU
    // on short inputs, few enough that the parts take memory linear in the number of blocks.
    static constexpr int64_t kMaxParts = 128;

    int64_t blocks;
    int64_t parts;  // at most, for one tile of keys

    BlockScoresCut(int64_t tokens, int64_t num_blocks, int64_t sequences) : blocks(num_blocks) {
        // Two neighbouring tiles of a sequence have more than kQueryRows rows together.
        const int64_t tiles =
            std::min(num_blocks, 2 * tokens / (kQueryRows + 1) + std::max<int64_t>(sequences, 0));
        parts = std::max<int64_t>(std::min(tiles, kMaxParts), 1);
    }

    /// 4-byte elements: counters, 4 + 2 for each block, firsts of both kinds of tiles and of groups
    /// of tiles, the parts.
    int64_t scratch() const { return 4 + 6 * blocks + 3 * (blocks + 1) + parts * blocks; }
};

}  // namespace lemo
