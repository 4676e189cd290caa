// A stand-in for libcublas while compute-sanitizer runs: the functions that lemo looks up, with one
// plain kernel. The library's kernels are large, write by bulk copies that initcheck does not see,
// and made racecheck stop with an internal error; these here are checked like any other.
// scripts/gpu_sanitize.sh builds it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <library_types.h>

namespace {

constexpr int kWarps = 8;

struct Matrix {
    const void* data;
    cudaDataType_t dtype;
    long long stride;  // between columns
    bool transposed;

    __device__ float at(long long row, long long column) const {
        const long long i = transposed ? column + row * stride : row + column * stride;
        switch (dtype) {
            case CUDA_R_16BF: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
            case CUDA_R_16F: return __half2float(static_cast<const __half*>(data)[i]);
            default: return static_cast<const float*>(data)[i];
        }
    }
};

/// One warp for each element of C [m, n]; all matrices by columns.
__global__ void
__launch_bounds__(kWarps * 32)
multiply(long long m, long long n, long long k, float alpha, Matrix a, Matrix b, float beta,
         Matrix c, void* out) {
    const long long element = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (element >= m * n) return;
    const long long row = element % m, column = element / m;
    // In fp64: the sign of a sum near 0 is that of the exact one.
    double sum = 0;
    for (long long i = threadIdx.x % 32; i < k; i += 32) {
        sum += static_cast<double>(a.at(row, i)) * b.at(i, column);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (threadIdx.x % 32 > 0) return;
    auto value = static_cast<float>(alpha * sum);
    if (beta != 0) value += beta * c.at(row, column);
    const long long i = row + column * c.stride;
    switch (c.dtype) {
        case CUDA_R_16BF: static_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16(value); break;
        case CUDA_R_16F: static_cast<__half*>(out)[i] = __float2half(value); break;
        default: static_cast<float*>(out)[i] = value;
    }
}

struct Handle {
    cudaStream_t stream;
};

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) {
    *handle = new Handle{};
    return 0;
}

int cublasSetMathMode(void*, int) { return 0; }

int cublasSetStream_v2(void* handle, cudaStream_t stream) {
    static_cast<Handle*>(handle)->stream = stream;
    return 0;
}

int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }

int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                 const void* a, cudaDataType_t a_dtype, int lda, const void* b,
                 cudaDataType_t b_dtype, int ldb, const void* beta, void* c,
                 cudaDataType_t c_dtype, int ldc, int, int) {
    const long long elements = static_cast<long long>(m) * n;
    if (elements == 0) return 0;
    const auto grid = static_cast<unsigned>((elements + kWarps - 1) / kWarps);
    multiply<<<grid, kWarps * 32, 0, static_cast<Handle*>(handle)->stream>>>(
        m, n, k, *static_cast<const float*>(alpha), Matrix{a, a_dtype, lda, op_a != 0},
        Matrix{b, b_dtype, ldb, op_b != 0}, *static_cast<const float*>(beta),
        Matrix{c, c_dtype, ldc, false}, c);
    return cudaPeekAtLastError() == cudaSuccess ? 0 : 13;  // CUBLAS_STATUS_EXECUTION_FAILED
}

const char* cublasGetStatusString(int) { return "the stand-in's kernel was not launched"; }

}  // extern "C"
