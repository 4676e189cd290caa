// Matrix products by cuBLAS, which is found at run time: nothing links against it.
#pragma once

#include <cstdint>

#include "lemo/tensor.h"

namespace lemo::cuda {

/// A row-major matrix whose rows are `stride` elements apart. As an operand of shape [r, c] it is
/// stored [r, c]; `transposed`: stored [c, r].
struct GemmOperand {
    const void* data;
    DType dtype;
    int64_t stride;
    bool transposed;
};

/// Device memory that cuBLAS may write during a product, from 256-byte boundaries on. Without one
/// cuBLAS takes a buffer from the pool of its handle; the result is right on any stream, but bit-
/// equal repeats are only promised while no other stream multiplies with the same handle, and a
/// captured graph allocates. Hand one in where either matters.
struct GemmWorkspace {
    void* data = nullptr;
    int64_t bytes = 0;
};

/// What cuBLAS asks for on sm_90; less suffices elsewhere.
inline constexpr int64_t kGemmWorkspaceBytes = int64_t{32} << 20;

/// C[m, n] = alpha * A[m, k] B[k, n] + beta * C, row-major, fp32 accumulation, on `stream` of the
/// current GPU. C is not read where beta is 0.
///
/// Supported: A and B both bfloat16 with C bfloat16 or float32; both float16 with C float16 or
/// float32; all float32, without TF32. Anything else, a size of 2^31 or more, a failing cuBLAS or
/// none at all (libcublas.so.13 or .12, in the process or on the loader's path) throws Error of
/// kind kUnsupported on behalf of `op`. Never synchronises with the host once the thread's handle
/// exists; that is made at the first call.
void gemm(const char* op, void* stream, int64_t m, int64_t n, int64_t k, float alpha, GemmOperand a,
          GemmOperand b, float beta, void* c, DType c_dtype, int64_t c_stride,
          GemmWorkspace workspace = {});

}  // namespace lemo::cuda
