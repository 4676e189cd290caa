// The order in which a thread block of the backward kernel visits the query tiles.
#pragma once

#include "segment_attention/plan.h"

namespace lemo::cuda::segment_attention {

/// A query tile of one head.
struct QueryStep {
    int m_tile;
    int head;
};

/// A thread block's walk over the query tiles that see its keys, from the last to the first, each
/// in every head of the group.
class QueryWalk {
public:
    __device__ QueryWalk(const AttentionPlan& plan, const SequenceTile& keys, int first_head,
                         int group, int num_heads, int block_m, int block_n)
        : first_head_(first_head), end_head_(first_head + group), shifted_head_(num_heads) {
        plain_ = tiles(VisibleKeys(plan, keys, 0, num_heads), keys, block_m, block_n);
        shifted_ = plain_;
        if (plan.num_shifts == 2) {
            shifted_head_ = num_heads / 2;
            shifted_ =
                tiles(VisibleKeys(plan, keys, num_heads - 1, num_heads), keys, block_m, block_n);
        }
        lowest_ = min(plain_.x, shifted_.x);
    }

    __device__ QueryStep first() const {
        QueryStep step{max(plain_.y, shifted_.y), end_head_ - 1};
        advance(step);
        return step;
    }

    __device__ bool done(const QueryStep& step) const { return step.m_tile < lowest_; }

    __device__ void advance(QueryStep& step) const {
        do {
            if (++step.head == end_head_) {
                step.head = first_head_;
                --step.m_tile;
            }
        } while (!done(step) && !visits(step));
    }

private:
    __device__ bool visits(const QueryStep& step) const {
        const int2 range = step.head < shifted_head_ ? plain_ : shifted_;
        return step.m_tile >= range.x && step.m_tile < range.y;
    }

    /// The half-open range of tiles with queries that see some of the keys.
    __device__ static int2 tiles(const VisibleKeys& visible, const SequenceTile& keys, int block_m,
                                 int block_n) {
        const int n_first = keys.tile * block_n;
        const int first_query = visible.first_query_past(n_first);
        const int end_query = visible.last_query_before(n_first + block_n);
        const int end = ceil_div(end_query, block_m);
        return make_int2(first_query < keys.num_q ? first_query / block_m : end, end);
    }

    int first_head_, end_head_, shifted_head_;
    int2 plain_, shifted_;
    int lowest_;
};

}  // namespace lemo::cuda::segment_attention
