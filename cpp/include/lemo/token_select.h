// token_select: block scores -> kept blocks, and the packed rows of the kept blocks.
#pragma once

#include <string_view>

#include "lemo/tensor.h"

namespace lemo {

/// Chooses blocks. "ratio": the ceil(value * blocks) best blocks of each sequence, ties to the
/// earlier block; "threshold": blocks with score >= value. Blocks at the two ends of a sequence are
/// forced and count towards the share. A NaN on a GPU, where no check reads it, is the lowest score
/// of all; it reaches no threshold.
struct TokenSelectParams {
    Tensor scores;            // [B] float32, no NaN
    Tensor block_starts;      // [B+1] int32
    Tensor cu_blocks;         // [N+1] int32
    std::string_view policy;  // "ratio" or "threshold"
    double value;             // share in [0, 1], or the threshold
    int64_t keep_first;       // blocks always kept at the start of a sequence
    int64_t keep_last;        // and at its end
    Tensor places;            // [B, 2] int32, written: which kept block of its sequence a block is
                              // and how many kept rows of the sequence precede it; or -1, -1
    Tensor cu_kept;           // [N+1] int32, written: first kept block of every sequence
    Tensor cu_rows;           // [N+1] int32, written: packed cu_seqlens of the kept rows
    Tensor counts;            // [2] int64, written: K kept blocks, R kept rows
};

/// Lists the chosen blocks and their rows. Split from the choice because the sizes of its results
/// may be known only after it. On the CPU a size that is not K or R raises; on a GPU what lies
/// beyond a size is left out, and what is left of a result that is too large is not written.
struct TokenRowsParams {
    Tensor block_starts;  // [B+1] int32
    Tensor cu_blocks;     // [N+1] int32
    Tensor places;        // [B, 2], [N+1], [N+1] int32, as TokenSelectParams writes them
    Tensor cu_kept;
    Tensor cu_rows;
    Tensor kept_blocks;  // [K] int32, written: ascending
    Tensor rows;         // [R] int32, written: packed rows, ascending
    Tensor positions;    // [R] int32, written: position of each row in its own sequence
};

void check(const TokenSelectParams& params);
void check(const TokenRowsParams& params);

void token_select_cpu(const TokenSelectParams& params);
void token_rows_cpu(const TokenRowsParams& params);

/// `stream` is a cudaStream_t. Asynchronous; the same bits on every run.
void token_select_cuda(const TokenSelectParams& params, void* stream);
void token_rows_cuda(const TokenRowsParams& params, void* stream);

}  // namespace lemo
