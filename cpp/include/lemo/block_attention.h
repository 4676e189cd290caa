// block_attention: how much attention chosen query rows give to each block of keys.
#pragma once

#include <cstdint>

#include "lemo/tensor.h"

namespace lemo {

/// Row r stands at packed row rows[r] and sees the tokens of its own sequence up to itself. Over
/// those of them that lie in block b, with s = scale * (q[r, h] . k[token, h / (H / Hk)]):
/// maximum[r, h, b] is the maximum of s, logsumexp[r, h, b] the logarithm of the sum of exp(s);
/// both are -inf where the row sees no token of the block.
struct BlockAttentionParams {
    Tensor q;             // [R, H, D] float
    Tensor k;             // [T, Hk, D] of q's dtype; H is a multiple of Hk
    Tensor rows;          // [R] int32 or int64, from 0 to T - 1, in any order
    Tensor block_starts;  // [B+1] int32
    Tensor cu_blocks;     // [N+1] int32
    double scale;         // positive
    Tensor maximum;       // [R, H, B] float32, written
    Tensor logsumexp;     // [R, H, B] float32, written
};

void check(const BlockAttentionParams& params);

void block_attention_cpu(const BlockAttentionParams& params);

/// On CUDA q and k are bfloat16 or float16, with a head size of a multiple of 8 up to 128. What
/// `rows` holds is not checked there: a row beyond the tokens sees none.
void block_attention_cuda(const BlockAttentionParams& params, void* stream);

}  // namespace lemo
