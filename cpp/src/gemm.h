// Row-major fp32 matrix products by BLAS, one thread for each call; call it from parallel_for.
#pragma once

#include <cstdint>

namespace lemo::cpu {

enum class Trans : bool { kNo, kYes };

/// C [m, n] = alpha * op(A) [m, k] * op(B) [k, n] + beta * C; `ld*` are row strides in elements.
void gemm(Trans trans_a, Trans trans_b, int64_t m, int64_t n, int64_t k, float alpha,
          const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c,
          int64_t ldc);

}  // namespace lemo::cpu
