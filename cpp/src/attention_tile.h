// The element-wise work between attention's matrix products, one tile of scores at a time.
#pragma once

#include <cstdint>

#include "exp2.h"
#include "lemo/blocks.h"
#include "lemo/segment_attention.h"

namespace lemo::cpu {

/// What q . k is multiplied by: scores in units of log2 save a multiplication in every exponential,
/// and those below a softcap are in its units.
inline float score_factor(const SegmentAttentionParams& params) {
    return params.softcap > 0.0f ? params.scale / params.softcap : params.scale * kLog2E;
}

/// A tile of scores: `rows` stacked query rows against `keys` packed keys from `first_key` on. Row
/// r sees the keys of `visible[r]`; whatever else the tile holds becomes 0.
struct ScoreTile {
    int64_t rows;
    int64_t keys;
    int64_t first_key;
    const Range* visible;  // [rows]
    // softcap * log2 e where scores arrive divided by the softcap; 0: no softcap.
    float cap_log2;
};

/// One step of the online softmax. `scores` [rows, keys] are in units of log2 (scaled by log2 e),
/// or of the softcap, and become 2^(score - row_max); `row_max` and `row_sum` [rows] and the sums
/// of values so far, `out` [rows, head_size], move to the new maximum.
void softmax_tile(const ScoreTile& tile, float* scores, float* row_max, float* row_sum, float* out,
                  int64_t head_size);

/// Turns scores (units as above) into probabilities P = 2^(score - log2_sum[row]), and dP into
/// P * (dP - delta[row]), the gradient of the scores, before the softcap where there is one.
void softmax_backward_tile(const ScoreTile& tile, float* scores, float* dp, const float* log2_sum,
                           const float* delta);

}  // namespace lemo::cpu
