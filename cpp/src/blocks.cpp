#include "lemo/blocks.h"

#include <algorithm>
#include <limits>

#include "lemo/check.h"

namespace lemo {

namespace {

void check_sequences(const Checker& check, const std::vector<int64_t>& seqlens,
                     int64_t block_size) {
    check.block_size(block_size);
    int64_t rows = 0;
    for (const int64_t length : seqlens) {
        check.that(length >= 0, "seqlens", "lengths of at least 0", length);
        check.that(length <= std::numeric_limits<int32_t>::max() - rows, "seqlens",
                   "at most 2147483647 tokens in all", "more");
        rows += length;
    }
}

}  // namespace

BlockPlan plan_blocks(const std::vector<int64_t>& seqlens, int64_t block_size) {
    check_sequences(Checker("plan_blocks"), seqlens, block_size);
    BlockPlan plan{{0}, {0}};
    int64_t row = 0;
    for (const int64_t length : seqlens) {
        for (int64_t first = 0; first < length; first += block_size) {
            const int64_t end = row + std::min(first + block_size, length);
            plan.block_starts.push_back(static_cast<int32_t>(end));
        }
        row += length;
        plan.cu_blocks.push_back(static_cast<int32_t>(plan.block_starts.size() - 1));
    }
    return plan;
}

SelectionSize plan_selection(const std::vector<int64_t>& seqlens, int64_t block_size, double value,
                             int64_t keep_first, int64_t keep_last) {
    const Checker check("plan_selection");
    check_sequences(check, seqlens, block_size);
    check.that(value >= 0 && value <= 1, "value", "a share between 0 and 1", value);
    check.that(keep_first >= 0, "keep_first", "at least 0", keep_first);
    check.that(keep_last >= 0, "keep_last", "at least 0", keep_last);

    SelectionSize size{0, 0};
    bool known = true;
    for (const int64_t length : seqlens) {
        const int64_t blocks = num_blocks(length, block_size);
        const Range open = open_blocks(blocks, keep_first, keep_last);
        const int64_t num_open = open.end - open.first;
        const int64_t taken = num_taken_blocks(blocks, open, value);
        const int64_t kept = blocks - num_open + taken;
        const int64_t missing = blocks * block_size - length;  // rows the last block is short of
        const bool last_is_open = num_open > 0 && open.end == blocks;
        known = known && (missing == 0 || !last_is_open || taken == 0 || taken == num_open);
        const bool last_is_kept = last_is_open ? taken == num_open : blocks > 0;
        size.blocks += kept;
        size.rows += kept * block_size - (last_is_kept ? missing : 0);
    }
    if (!known) size.rows = -1;
    return size;
}

int64_t plan_loss_chunk(int64_t rows, int64_t vocabulary, int64_t budget_bytes) {
    const Checker check("plan_loss_chunk");
    check.that(rows >= 0, "rows", "at least 0", rows);
    check.that(vocabulary >= 1, "vocabulary", "at least 1", vocabulary);
    check.that(budget_bytes >= 1, "budget_bytes", "at least 1", budget_bytes);
    const int64_t fitting = budget_bytes / static_cast<int64_t>(sizeof(float)) / vocabulary;
    return std::clamp<int64_t>(fitting, 1, std::max<int64_t>(rows, 1));
}

}  // namespace lemo
