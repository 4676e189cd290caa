// The kernel of block_attention, for compute capability 8.0 and newer.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lemo/tensor.h"

namespace lemo::cuda::block_attention::portable {

struct AttentionArguments {
    const void* q;
    const void* k;
    const void* rows;
    bool wide_rows;  // int64, not int32
    const int32_t* block_starts;
    const int32_t* cu_blocks;
    int64_t num_rows;
    int num_tokens, num_sequences, num_blocks;
    int heads, key_heads, head_dim;
    float scale;
    float* maximum;
    float* logsumexp;
};

/// `dtype` is bfloat16 or float16; there is at least one result.
void launch(const AttentionArguments& args, DType dtype, cudaStream_t stream);

}  // namespace lemo::cuda::block_attention::portable
