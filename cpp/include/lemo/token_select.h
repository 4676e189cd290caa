// token_select: block scores -> kept blocks, and the packed rows of the kept blocks.
#pragma once

#include <string_view>

#include "lemo/tensor.h"

namespace lemo {

/// Chooses blocks. "ratio": the ceil(value * blocks) best blocks of each sequence, ties to the
/// earlier block; "threshold": blocks with score >= value. Blocks at the two ends of a sequence are
/// forced and count towards the share.
struct TokenSelectParams {
    Tensor scores;            // [B] float32, no NaN
    Tensor block_starts;      // [B+1] int32
    Tensor cu_blocks;         // [N+1] int32
    std::string_view policy;  // "ratio" or "threshold"
    double value;             // share in [0, 1], or the threshold
    int64_t keep_first;       // blocks always kept at the start of a sequence
    int64_t keep_last;        // and at its end
    Tensor kept_blocks;       // [B] int32; the first K entries are written, ascending
    Tensor cu_rows;           // [N+1] int32, written: packed cu_seqlens of the kept rows
    Tensor counts;            // [2] int64, written: K kept blocks, R kept rows
};

/// Lists the rows of the chosen blocks. Split from the choice because K and R, which size its
/// results, are known only after it.
struct TokenRowsParams {
    Tensor block_starts;  // [B+1] int32
    Tensor cu_blocks;     // [N+1] int32
    Tensor kept_blocks;   // [K] int32, strictly ascending
    Tensor rows;          // [R] int32, written: packed rows, ascending
    Tensor positions;     // [R] int32, written: position of each row in its own sequence
};

void check(const TokenSelectParams& params);
void check(const TokenRowsParams& params);

void token_select_cpu(const TokenSelectParams& params);
void token_rows_cpu(const TokenRowsParams& params);

}  // namespace lemo
