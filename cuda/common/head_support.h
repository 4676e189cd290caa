// What kernels support whose tiles are for heads of at most 128 columns.
#pragma once

#include "common/vector.h"
#include "lemo/check.h"

namespace lemo::cuda {

/// `q` and `k` are bf16 or fp16, with a head size of a multiple of 8 up to 128, and aligned for
/// accesses of 16 bytes.
inline void check_small_heads(const Checker& check, const Tensor& q, const Tensor& k) {
    check.that(q.dtype != DType::kFloat32, "q", "bfloat16 or float16 on CUDA", q,
               ErrorKind::kUnsupported);
    const int64_t head_dim = q.size(2);
    check.that(head_dim >= 8 && head_dim <= 128 && head_dim % 8 == 0, "q",
               "a head size of a multiple of 8 up to 128 on CUDA", head_dim,
               ErrorKind::kUnsupported);
    for (const auto& [name, tensor] : {std::pair{"q", &q}, std::pair{"k", &k}}) {
        check.that(vectorisable(0, {tensor->data}), name, "data at a multiple of 16 bytes",
                   "another address", ErrorKind::kUnsupported);
    }
}

}  // namespace lemo::cuda
