// segment_attention: causal attention among the packed rows of each sequence, forward and backward.
#pragma once

#include <cstdint>

#include "lemo/tensor.h"

namespace lemo {

/// Query i sees key j of its sequence iff `visible_positions` (blocks.h) of i's position holds j's.
struct SegmentAttentionParams {
    Tensor q;            // [Rq, Hq, D] float
    Tensor k;            // [Rk, Hk, D] of q's dtype, Hq a multiple of Hk
    Tensor v;            // [Rk, Hk, D] of q's dtype
    Tensor cu_q;         // [N+1] int32, first query row of each sequence
    Tensor cu_k;         // [N+1] int32, first key row of each sequence
    Tensor q_positions;  // [Rq] int32, strictly ascending in each sequence; absent: row in sequence
    Tensor k_positions;  // [Rk] int32, likewise; absent iff q_positions is
    float scale = 1.0f;
    int64_t window = 0;      // positions a query sees back, its own included; 0: no limit
    int64_t group_size = 0;  // positions of a shifted group; 0: no groups
    Tensor out;              // [Rq, Hq, D] of q's dtype; read by the backward pass
    Tensor lse;              // [Hq, Rq] fp32, natural logarithm; -inf where a query sees no key
};

struct SegmentAttentionBackwardParams {
    SegmentAttentionParams forward;
    Tensor dout;  // [Rq, Hq, D] of q's dtype
    Tensor dq;    // as q, written
    Tensor dk;    // as k, written
    Tensor dv;    // as v, written
};

void check(const SegmentAttentionParams& params);
void check(const SegmentAttentionBackwardParams& params);

void segment_attention_cpu(const SegmentAttentionParams& params);
void segment_attention_backward_cpu(const SegmentAttentionBackwardParams& params);

}  // namespace lemo
