// How one attention call is cut into query tiles, and which keys each query row and tile sees.
#pragma once

#include <cstdint>
#include <vector>

#include "lemo/blocks.h"
#include "lemo/segment_attention.h"

namespace lemo::cpu {

/// The query heads that share a key/value head are stacked: row r and head g of the group become
/// row r * heads_per_kv + g of one tall product against the shared keys. In memory a row's heads of
/// a group are neighbours, so a stack is read and written with one run per row.
class AttentionPlan {
public:
    /// Query tiles of about `stacked_rows` stacked rows each, none across two sequences.
    AttentionPlan(const SegmentAttentionParams& params, int64_t stacked_rows);

    int64_t num_queries, num_keys, num_heads, num_kv_heads, heads_per_kv;
    int64_t head_size, value_size;      // columns of queries and keys, and of values
    int64_t max_stacked_rows;           // of any tile
    std::vector<Range> tiles;           // packed query rows
    std::vector<Range> sequence_tiles;  // of each sequence
    std::vector<Range> sequence_keys;   // packed key rows of each sequence

    /// Packed key rows that query row `row` sees with `head`.
    const Range& visible(int64_t head, int64_t row) const {
        const bool shifted = variants_ == 2 && head >= num_heads / 2;
        return visible_[static_cast<size_t>(shifted ? num_queries + row : row)];
    }

    /// The smallest range of packed key rows that holds what any row of the tile sees with any head
    /// of the group; {0, 0} where that is nothing.
    Range keys(int64_t tile, int64_t kv_head) const;

    /// visible() of every stacked row of the tile.
    void stack_visible(int64_t tile, int64_t kv_head, Range* stacked) const;

private:
    int64_t variants_;  // 2: the heads of the second half see shifted groups
    std::vector<Range> visible_;
};

}  // namespace lemo::cpu
