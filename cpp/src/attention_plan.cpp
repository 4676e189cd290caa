#include "attention_plan.h"

#include <algorithm>
#include <limits>

#include "parallel.h"

namespace lemo::cpu {
namespace {

// Rows a thread should own before a second one pays.
constexpr int64_t kRowsPerThread = 1024;

}  // namespace

AttentionPlan::AttentionPlan(const SegmentAttentionParams& params, int64_t stacked_rows)
    : num_queries(params.q.size(0)), num_keys(params.k.size(0)), num_heads(params.q.size(1)),
      num_kv_heads(params.k.size(1)), heads_per_kv(num_heads / num_kv_heads),
      head_size(params.q.size(2)), value_size(params.v.size(2)), max_stacked_rows(0),
      variants_(params.group_size > 0 ? 2 : 1),
      visible_(static_cast<size_t>(variants_ * num_queries)) {
    const int32_t* cu_q = params.cu_q.as<const int32_t>();
    const int32_t* cu_k = params.cu_k.as<const int32_t>();
    const int32_t* q_position = params.q_positions.as<const int32_t>();
    const int32_t* k_position = params.k_positions.as<const int32_t>();
    const int64_t tile_rows = std::max<int64_t>(stacked_rows / heads_per_kv, 1);

    for (int64_t n = 0; n + 1 < params.cu_q.size(0); ++n) {
        const Range rows{cu_q[n], cu_q[n + 1]}, keys{cu_k[n], cu_k[n + 1]};
        const int64_t first_tile = static_cast<int64_t>(tiles.size());
        for (int64_t row = rows.first; row < rows.end; row += tile_rows) {
            tiles.push_back({row, std::min(row + tile_rows, rows.end)});
            const int64_t stacked = (tiles.back().end - row) * heads_per_kv;
            max_stacked_rows = std::max(max_stacked_rows, stacked);
        }
        sequence_tiles.push_back({first_tile, static_cast<int64_t>(tiles.size())});
        sequence_keys.push_back(keys);

        // The packed key row of the first key at `position` or after it.
        const auto key_at = [&](int64_t position) {
            if (k_position == nullptr) return std::min(keys.first + position, keys.end);
            return static_cast<int64_t>(
                std::lower_bound(k_position + keys.first, k_position + keys.end, position) -
                k_position);
        };
        for (int64_t variant = 0; variant < variants_; ++variant) {
            const int64_t shift = variant == 0 ? 0 : params.group_size / 2;
            Range* visible = visible_.data() + variant * num_queries;
            parallel_ranges(rows.end - rows.first, kRowsPerThread, [&](int64_t a, int64_t b) {
                for (int64_t row = rows.first + a; row < rows.first + b; ++row) {
                    const int64_t position = q_position ? q_position[row] : row - rows.first;
                    const Range seen =
                        visible_positions(position, params.window, params.group_size, shift);
                    visible[row] = {key_at(seen.first), key_at(seen.end)};
                }
            });
        }
    }
}

Range AttentionPlan::keys(int64_t tile, int64_t kv_head) const {
    const Range rows = tiles[static_cast<size_t>(tile)];
    // Within a half of the heads everybody sees the same, so the group's two ends stand for it.
    const int64_t heads[] = {kv_head * heads_per_kv, (kv_head + 1) * heads_per_kv - 1};
    Range all{std::numeric_limits<int64_t>::max(), 0};
    for (int64_t row = rows.first; row < rows.end; ++row) {
        for (const int64_t head : heads) {
            const Range& seen = visible(head, row);
            if (seen.first >= seen.end) continue;
            all = {std::min(all.first, seen.first), std::max(all.end, seen.end)};
        }
    }
    return all.end == 0 ? Range{0, 0} : all;
}

void AttentionPlan::stack_visible(int64_t tile, int64_t kv_head, Range* stacked) const {
    const Range rows = tiles[static_cast<size_t>(tile)];
    for (int64_t row = rows.first; row < rows.end; ++row) {
        for (int64_t g = 0; g < heads_per_kv; ++g) {
            *stacked++ = visible(kv_head * heads_per_kv + g, row);
        }
    }
}

}  // namespace lemo::cpu
