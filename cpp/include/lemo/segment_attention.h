// segment_attention: causal attention among the packed rows of each sequence, forward and backward.
#pragma once

#include <cstdint>
#include <string_view>

#include "lemo/tensor.h"

namespace lemo {

/// Query i sees key j of its sequence iff `visible_positions` (blocks.h) of i's position holds j's.
/// Scores are s = scale * q . k, or softcap * tanh(s / softcap).
struct SegmentAttentionParams {
    Tensor q;            // [Rq, Hq, D] float
    Tensor k;            // [Rk, Hk, D] of q's dtype, Hq a multiple of Hk
    Tensor v;            // [Rk, Hk, Dv] of q's dtype
    Tensor cu_q;         // [N+1] int32, first query row of each sequence
    Tensor cu_k;         // [N+1] int32, first key row of each sequence
    Tensor q_positions;  // [Rq] int32, strictly ascending in each sequence; absent: row in sequence
    Tensor k_positions;  // [Rk] int32, likewise; absent iff q_positions is
    float scale = 1.0f;
    int64_t window = 0;      // positions a query sees back, its own included; 0: no limit
    int64_t group_size = 0;  // positions of a shifted group; 0: no groups
    float softcap = 0.0f;    // bound of the scores; 0: none
    Tensor sinks;            // [Hq] fp32, a further score of each head, without a value; or absent
    // On a GPU also "hopper", "portable", "portable-small" (for tests).
    std::string_view kernel = "auto";
    Tensor out;  // [Rq, Hq, Dv] of q's dtype; read by the backward pass
    // [Hq, Rq] fp32, natural logarithm, the sink's score included; -inf where there is no score.
    Tensor lse;
    // On a GPU: segment_attention_scratch_bytes bytes of its memory, from a 256-byte boundary on.
    void* scratch = nullptr;
};

struct SegmentAttentionBackwardParams {
    SegmentAttentionParams forward;
    bool deterministic = true;  // bit-equal repeats; the CPU always is
    Tensor dout;                // [Rq, Hq, Dv] of q's dtype
    Tensor dq;                  // as q, written
    Tensor dk;                  // as k, written
    Tensor dv;                  // as v, written
    Tensor dsinks;              // as sinks, written
    void* scratch = nullptr;    // as that of `forward`, which is not used
};

void check(const SegmentAttentionParams& params);
void check(const SegmentAttentionBackwardParams& params);

void segment_attention_cpu(const SegmentAttentionParams& params);
void segment_attention_backward_cpu(const SegmentAttentionBackwardParams& params);

/// Scratch of a call on CUDA; `scratch` itself is not looked at. Throws Error where CUDA does not
/// support the arguments.
int64_t segment_attention_scratch_bytes(const SegmentAttentionParams& params);
int64_t segment_attention_scratch_bytes(const SegmentAttentionBackwardParams& params);

/// bf16 and fp16, D and Dv multiples of 8 up to 256, 16-byte aligned data. `stream` is a
/// cudaStream_t. Asynchronous. Without `deterministic` the order of the sums in dq varies.
void segment_attention_cuda(const SegmentAttentionParams& params, void* stream);
void segment_attention_backward_cuda(const SegmentAttentionBackwardParams& params, void* stream);

}  // namespace lemo
