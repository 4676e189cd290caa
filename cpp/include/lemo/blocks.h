// Arithmetic of blocks, loss chunks and rows, shared by host code, device code and the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__CUDACC__)
#define LEMO_HOST_DEVICE __host__ __device__
#else
#define LEMO_HOST_DEVICE
#endif

namespace lemo {

template <typename Int>
LEMO_HOST_DEVICE constexpr Int ceil_div(Int value, Int divisor) {
    return (value + divisor - 1) / divisor;
}

/// Blocks that a sequence of `length` tokens is cut into; the last one may be ragged.
LEMO_HOST_DEVICE constexpr int64_t num_blocks(int64_t length, int64_t block_size) {
    return ceil_div(length, block_size);
}

/// LongLoRA's shifted groups: heads of the second half shift by half a group.
LEMO_HOST_DEVICE constexpr int64_t group_shift(int64_t head, int64_t num_heads,
                                               int64_t group_size) {
    return head < num_heads / 2 ? 0 : group_size / 2;
}

/// First position of the group that holds `position`.
LEMO_HOST_DEVICE constexpr int64_t group_first(int64_t position, int64_t group_size,
                                               int64_t shift) {
    const int64_t first = (position + shift) / group_size * group_size - shift;
    return first < 0 ? 0 : first;
}

/// The half-open range [first, end); empty where end <= first.
struct Range {
    int64_t first;
    int64_t end;
};

/// Positions that a query at `position` may see: causal, at most `window` of them (0: no limit),
/// and of the query's own group of `group_size` positions (0: no groups). A range for every query,
/// with ends that grow with `position`, so a kernel needs no mask beyond two comparisons.
LEMO_HOST_DEVICE constexpr Range visible_positions(int64_t position, int64_t window,
                                                   int64_t group_size, int64_t shift) {
    int64_t first = 0;
    if (window > 0 && position >= window) first = position - window + 1;
    if (group_size > 0) {
        const int64_t group = group_first(position, group_size, shift);
        if (group > first) first = group;
    }
    return {first, position + 1};
}

/// The blocks of a sequence of `blocks` blocks that a policy decides about; those before and after
/// them are forced.
LEMO_HOST_DEVICE constexpr Range open_blocks(int64_t blocks, int64_t keep_first,
                                             int64_t keep_last) {
    const int64_t first = keep_first < blocks ? keep_first : blocks;
    const int64_t end = keep_last < blocks ? blocks - keep_last : 0;
    return {first, end > first ? end : first};
}

/// How many of its open blocks a share of `value` takes from a sequence: ceil(value * blocks), less
/// the forced ones. A fused product, so that host and device round alike, whatever their compilers.
LEMO_HOST_DEVICE inline int64_t num_taken_blocks(int64_t blocks, Range open, double value) {
    // The product may land an ulp above a whole number: 0.07 * 100 is 7 blocks, not 8.
    constexpr double kSlack = 1e-9;
    const double budget = ceil(fma(value, static_cast<double>(blocks), -kSlack));
    const int64_t num_open = open.end - open.first;
    const int64_t taken = static_cast<int64_t>(budget) - (blocks - num_open);
    return taken < 0 ? 0 : taken > num_open ? num_open : taken;
}

/// Blocks of packed sequences: `block_starts` [B+1] first rows, `cu_blocks` [N+1] first blocks.
struct BlockPlan {
    std::vector<int32_t> block_starts;
    std::vector<int32_t> cu_blocks;
};

/// Cuts each sequence into blocks of `block_size` tokens. Throws Error on negative lengths, a block
/// size below 1, or more than 2^31 - 1 tokens in all.
BlockPlan plan_blocks(const std::vector<int64_t>& seqlens, int64_t block_size);

struct SelectionSize {
    int64_t blocks;
    int64_t rows;  // -1 where they depend on the scores
};

/// What the ratio policy keeps of these sequences. The rows depend on the scores only where a
/// ragged last block competes with other blocks. Throws Error on arguments that do not fit.
SelectionSize plan_selection(const std::vector<int64_t>& seqlens, int64_t block_size, double value,
                             int64_t keep_first, int64_t keep_last);

/// Rows of one loss chunk, so that its fp32 logits take at most `budget_bytes` (at least 1 row).
int64_t plan_loss_chunk(int64_t rows, int64_t vocabulary, int64_t budget_bytes);

}  // namespace lemo
