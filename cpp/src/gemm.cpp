#include "gemm.h"

#include <cblas.h>

#include <algorithm>

namespace lemo::cpu {
namespace {

// The library serves lemo alone (NumPy and SciPy carry their own copies): its threads are ours.
[[maybe_unused]] const bool single_threaded = [] {
    scipy_openblas_set_num_threads(1);
    return true;
}();

}  // namespace

void gemm(Trans trans_a, Trans trans_b, int64_t m, int64_t n, int64_t k, float alpha,
          const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c,
          int64_t ldc) {
    if (m == 0 || n == 0) return;
    const auto cblas = [](Trans t) { return t == Trans::kYes ? CblasTrans : CblasNoTrans; };
    // BLAS rejects a leading dimension of 0, which an empty k gives.
    const auto ld = [](int64_t value) { return static_cast<int>(std::max<int64_t>(value, 1)); };
    scipy_cblas_sgemm(CblasRowMajor, cblas(trans_a), cblas(trans_b), static_cast<int>(m),
                      static_cast<int>(n), static_cast<int>(k), alpha, a, ld(lda), b, ld(ldb), beta,
                      c, ld(ldc));
}

}  // namespace lemo::cpu
