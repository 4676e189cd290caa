// block_attention on CUDA: what is supported. One tier.
#include "lemo/block_attention.h"

#include <string>

#include "block_attention/portable/kernel.h"
#include "common/vector.h"
#include "lemo/check.h"

namespace lemo {
namespace {

void check_supported(const BlockAttentionParams& params) {
    const Checker check("block_attention");
    check.that(params.q.dtype != DType::kFloat32, "q", "bfloat16 or float16 on CUDA",
               describe(params.q), ErrorKind::kUnsupported);
    const int64_t head_dim = params.q.size(2);
    check.that(head_dim >= 8 && head_dim <= 128 && head_dim % 8 == 0, "q",
               "a head size of a multiple of 8 up to 128 on CUDA", std::to_string(head_dim),
               ErrorKind::kUnsupported);
    for (const auto& [name, tensor] : {std::pair{"q", &params.q}, std::pair{"k", &params.k}}) {
        check.that(cuda::vectorisable(0, {tensor->data}), name, "data at a multiple of 16 bytes",
                   "another address", ErrorKind::kUnsupported);
    }
}

}  // namespace

void block_attention_cuda(const BlockAttentionParams& params, void* stream) {
    using namespace cuda::block_attention::portable;
    check_supported(params);
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
