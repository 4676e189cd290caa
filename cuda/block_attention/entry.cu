// block_attention on CUDA: what is supported. One tier.
#include "lemo/block_attention.h"

#include "block_attention/portable/kernel.h"
#include "common/head_support.h"

namespace lemo {

void block_attention_cuda(const BlockAttentionParams& params, void* stream) {
    using namespace cuda::block_attention::portable;
    cuda::check_small_heads(Checker("block_attention"), params.q, params.k);
    if (params.maximum.is_empty()) return;
    const auto count = [](int64_t value) { return static_cast<int>(value); };
    const AttentionArguments args{params.q.data,
                                  params.k.data,
                                  params.rows.data,
                                  params.rows.dtype == DType::kInt64,
                                  params.block_starts.as<const int32_t>(),
                                  params.cu_blocks.as<const int32_t>(),
                                  params.q.size(0),
                                  count(params.k.size(0)),
                                  count(params.cu_blocks.size(0) - 1),
                                  count(params.maximum.size(2)),
                                  count(params.q.size(1)),
                                  count(params.k.size(1)),
                                  count(params.q.size(2)),
                                  static_cast<float>(params.scale),
                                  params.maximum.as<float>(),
                                  params.logsumexp.as<float>()};
    launch(args, params.q.dtype, static_cast<cudaStream_t>(stream));
}

}  // namespace lemo
