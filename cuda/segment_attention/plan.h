// What every attention kernel has to know beyond its tensors: which rows a thread block owns, and
// which keys each query sees.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "common/arena.h"
#include "common/search.h"
#include "lemo/blocks.h"
#include "lemo/segment_attention.h"

namespace lemo::cuda::segment_attention {

/// How scores are made of q . k; passed to kernels by value.
struct ScoreSettings {
    float scale;
    // Factor of q . k below the tanh of a softcap, see tanh_of_log2; without a softcap not used.
    float tanh_factor;
    // What the softmax multiplies its scores by: |scale|, or the softcap. The softmax works on
    // q . k with the sign of the scale, or on the tanh.
    float softmax_scale;
    const float* sinks;  // [heads], a further score of each head; or null
    bool capped;

    explicit ScoreSettings(const SegmentAttentionParams& params)
        : scale(params.scale), tanh_factor(0), softmax_scale(std::fabs(params.scale)),
          sinks(params.sinks ? params.sinks.as<const float>() : nullptr),
          capped(params.softcap > 0) {
        if (!capped) return;
        tanh_factor = 2.0f * float(M_LOG2E) * params.scale / params.softcap;
        softmax_scale = params.softcap;
    }
    ScoreSettings() = default;
};

/// In the place of the tanh of a score that the query does not see.
inline constexpr float kHiddenTanh = -2.0f;

/// Sequences of an attention call and the scratch that describes them; passed to kernels by value.
struct AttentionPlan {
    const int32_t* cu_q;        // [num_sequences + 1]
    const int32_t* cu_k;        // [num_sequences + 1]
    const int32_t* cu_q_tiles;  // [num_sequences + 1], first query tile; null: one sequence
    const int32_t* cu_k_tiles;  // [num_sequences + 1], first key tile; null: one sequence
    const int2* visible;  // [num_shifts, num_queries], keys a query sees; null: rows up to its own
    int num_sequences;
    int num_queries;  // rows of all sequences
    int num_shifts;   // 2 with shifted groups, whose second half of heads sees other keys
    int max_q_tiles;  // upper bounds over all possible cuts, known without reading the device
    int max_k_tiles;
};

/// One tile of query or key rows of one sequence.
struct SequenceTile {
    int sequence;
    int tile;  // within the sequence
    int num_tiles;
    int q_first;  // first row of the sequence among the packed rows
    int k_first;
    int num_q;
    int num_k;
};

/// Finds the tile of a thread block; false where the upper bound of the grid was too high.
__device__ __forceinline__ bool find_tile(const AttentionPlan& plan, const int32_t* cu_tiles,
                                          const int32_t* cu_rows, int tile_rows, int tile,
                                          SequenceTile& found) {
    int sequence = 0;
    int first_tile = 0;
    if (cu_tiles != nullptr) {
        if (tile >= cu_tiles[plan.num_sequences]) return false;
        sequence = part_of(cu_tiles, plan.num_sequences, tile);
        first_tile = cu_tiles[sequence];
    }
    found.sequence = sequence;
    found.tile = tile - first_tile;
    found.num_tiles = ceil_div(cu_rows[sequence + 1] - cu_rows[sequence], tile_rows);
    found.q_first = plan.cu_q[sequence];
    found.k_first = plan.cu_k[sequence];
    found.num_q = plan.cu_q[sequence + 1] - found.q_first;
    found.num_k = plan.cu_k[sequence + 1] - found.k_first;
    return found.tile < found.num_tiles;
}

/// The place of a thread block in a grid of `heads` heads side by side, tile after tile. All lie in
/// the first dimension: a second one ends at 65535 tiles.
struct HeadAndTile {
    int head, tile;

    __device__ __forceinline__ explicit HeadAndTile(int heads)
        : head(static_cast<int>(blockIdx.x % static_cast<unsigned>(heads))),
          tile(static_cast<int>(blockIdx.x / static_cast<unsigned>(heads))) {}
};

/// The keys that the queries of one sequence see, as a half-open range of rows of the sequence.
/// Both ends grow with the query (blocks.h), so the first and the last query of a tile bound it.
class VisibleKeys {
public:
    __device__ VisibleKeys(const AttentionPlan& plan, const SequenceTile& tile, int head,
                           int num_heads)
        : ranges_(plan.visible), num_q_(tile.num_q), num_k_(tile.num_k) {
        if (ranges_ == nullptr) return;
        const bool shifted = plan.num_shifts == 2 && head >= num_heads / 2;
        ranges_ += (shifted ? int64_t{plan.num_queries} : 0) + tile.q_first;
    }

    /// Rows past the end of the sequence see what its last one sees.
    __device__ int2 operator()(int query) const {
        query = min(query, num_q_ - 1);
        return ranges_ != nullptr ? __ldg(ranges_ + query) : make_int2(0, min(query + 1, num_k_));
    }

    /// The first query whose range ends beyond key `key`; num_q where none does.
    __device__ int first_query_past(int key) const {
        if (ranges_ == nullptr) return key < num_k_ ? min(key, num_q_) : num_q_;
        return partition_point(num_q_, [&](int query) { return ranges_[query].y <= key; });
    }

    /// One past the last query whose range begins before key `key`.
    __device__ int last_query_before(int key) const {
        if (ranges_ == nullptr) return num_q_;
        return partition_point(num_q_, [&](int query) { return ranges_[query].x < key; });
    }

private:
    const int2* ranges_;
    int num_q_, num_k_;
};

/// Scratch of a plan.
struct PlanScratch {
    int32_t* cu_q_tiles;
    int32_t* cu_k_tiles;
    int2* visible;

    PlanScratch(const SegmentAttentionParams& params, Arena& arena);
};

/// The plan for tiles of so many rows; kernels on `stream` fill its scratch.
AttentionPlan make_plan(const SegmentAttentionParams& params, int q_tile_rows, int k_tile_rows,
                        const PlanScratch& scratch, cudaStream_t stream);

/// The most tiles that `num_rows` rows in `num_sequences` sequences can be cut into.
constexpr int64_t max_tiles(int64_t num_rows, int64_t num_sequences, int64_t tile_rows) {
    return num_rows / tile_rows + num_sequences;
}

}  // namespace lemo::cuda::segment_attention
