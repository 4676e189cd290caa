// The element-wise work between attention's matrix products, one tile of scores at a time.
#pragma once

#include <cstdint>

#include "lemo/blocks.h"

namespace lemo::cpu {

/// A tile of scores: `rows` stacked query rows against `keys` packed keys from `first_key` on. Row
/// r sees the keys of `visible[r]`; whatever else the tile holds becomes 0.
struct ScoreTile {
    int64_t rows;
    int64_t keys;
    int64_t first_key;
    const Range* visible;  // [rows]
};

/// One step of the online softmax. `scores` [rows, keys] are in units of log2 (scaled by log2 e)
/// and become 2^(score - row_max); `row_max` and `row_sum` [rows] and the sums of values so far,
/// `out` [rows, head_size], move to the new maximum.
void softmax_tile(const ScoreTile& tile, float* scores, float* row_max, float* row_sum, float* out,
                  int64_t head_size);

/// Turns scores (units of log2) into probabilities P = 2^(score - log2_sum[row]), and dP into
/// P * (dP - delta[row]), the gradient of the scores.
void softmax_backward_tile(const ScoreTile& tile, float* scores, float* dp, const float* log2_sum,
                           const float* delta);

}  // namespace lemo::cpu
