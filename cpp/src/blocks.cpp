#include "lemo/blocks.h"

#include <algorithm>
#include <limits>

#include "lemo/check.h"

namespace lemo {

BlockPlan plan_blocks(const std::vector<int64_t>& seqlens, int64_t block_size) {
    const Checker check("plan_blocks");
    check.that(block_size >= 1, "block_size", "at least 1", std::to_string(block_size));

    BlockPlan plan{{0}, {0}};
    int64_t row = 0;
    for (const int64_t length : seqlens) {
        check.that(length >= 0, "seqlens", "lengths of at least 0", std::to_string(length));
        check.that(length <= std::numeric_limits<int32_t>::max() - row, "seqlens",
                   "at most 2147483647 tokens in all", "more");
        for (int64_t first = 0; first < length; first += block_size) {
            const int64_t end = row + std::min(first + block_size, length);
            plan.block_starts.push_back(static_cast<int32_t>(end));
        }
        row += length;
        plan.cu_blocks.push_back(static_cast<int32_t>(plan.block_starts.size() - 1));
    }
    return plan;
}

int64_t plan_loss_segment(int64_t rows, int64_t vocabulary, int64_t budget_bytes) {
    const Checker check("plan_loss_segment");
    check.that(rows >= 0, "rows", "at least 0", std::to_string(rows));
    check.that(vocabulary >= 1, "vocabulary", "at least 1", std::to_string(vocabulary));
    check.that(budget_bytes >= 1, "budget_bytes", "at least 1", std::to_string(budget_bytes));
    const int64_t fitting = budget_bytes / (vocabulary * static_cast<int64_t>(sizeof(float)));
    return std::clamp<int64_t>(fitting, 1, std::max<int64_t>(rows, 1));
}

}  // namespace lemo
