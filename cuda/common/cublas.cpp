#include "common/cublas.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#include "lemo/check.h"

namespace lemo::cuda {
namespace {

// The part of cuBLAS that is used, as its documentation declares it; the same in 12 and 13.
using Handle = void*;
using Status = int;
enum Operation : int { kNoTranspose = 0, kTranspose = 1 };
constexpr Status kSuccess = 0, kAllocationFailed = 3;
constexpr int kComputeFloat32 = 68;
constexpr int kDefaultAlgorithm = -1;
// The default mode (no TF32 for fp32), and partial sums of a split k stay fp32.
constexpr int kMathMode = 0 | 16;

struct Cublas {
    Status (*create)(Handle*);
    Status (*set_math_mode)(Handle, int);
    Status (*set_stream)(Handle, cudaStream_t);
    Status (*set_workspace)(Handle, void*, size_t);
    Status (*gemm)(Handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                   const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
                   const void* beta, void* c, int c_type, int ldc, int compute_type, int algorithm);
    const char* (*status_string)(Status);
    bool loaded = false;
};

/// Inside a torch process its own cuBLAS, otherwise what the loader finds. Never unloaded.
Cublas load_cublas() {
    void* library = nullptr;
    for (const int mode : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY}) {
        for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
            if (library == nullptr) library = dlopen(name, mode);
        }
    }
    Cublas cublas{};
    if (library == nullptr) return cublas;
    cublas.loaded = true;
    const auto find = [&](auto& function, const char* symbol) {
        void* address = dlsym(library, symbol);
        cublas.loaded = cublas.loaded && address != nullptr;
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
    };
    find(cublas.create, "cublasCreate_v2");
    find(cublas.set_math_mode, "cublasSetMathMode");
    find(cublas.set_stream, "cublasSetStream_v2");
    find(cublas.set_workspace, "cublasSetWorkspace_v2");
    find(cublas.gemm, "cublasGemmEx");
    find(cublas.status_string, "cublasGetStatusString");
    return cublas;
}

const Cublas& cublas_for(const char* op) {
    static const Cublas cublas = load_cublas();
    if (!cublas.loaded) {
        throw Error(ErrorKind::kUnsupported,
                    std::string(op) +
                        ": no cuBLAS found: expected libcublas.so.13 or "
                        "libcublas.so.12, loaded by torch or on the loader's path");
    }
    return cublas;
}

void require_success(const char* op, const Cublas& cublas, const char* what, Status status) {
    if (status == kSuccess) return;
    const bool no_memory = status == kAllocationFailed;
    throw Error(
        no_memory ? ErrorKind::kDeviceMemory : ErrorKind::kUnsupported,
        std::string(op) + ": cuBLAS failed in " + what + ": " + cublas.status_string(status));
}

/// Handles that no thread uses, by device. A handle serves one thread at a time; it outlives the
/// thread, as destroying it would synchronise, and might come after the driver has shut down.
class HandlePool {
public:
    static HandlePool& instance() {
        static HandlePool& pool = *new HandlePool;  // outlives every thread
        return pool;
    }

    Handle take(int device) {
        const std::lock_guard lock(mutex_);
        std::vector<Handle>& free = free_[device];
        if (free.empty()) return nullptr;
        Handle handle = free.back();
        free.pop_back();
        return handle;
    }

    void put_all(const std::map<int, Handle>& handles) {
        const std::lock_guard lock(mutex_);
        for (const auto& [device, handle] : handles) free_[device].push_back(handle);
    }

private:
    std::mutex mutex_;
    std::map<int, std::vector<Handle>> free_;
};

/// The handles of one thread, by device.
struct ThreadHandles {
    std::map<int, Handle> by_device;
    ~ThreadHandles() { HandlePool::instance().put_all(by_device); }
};

Handle current_handle(const char* op, const Cublas& cublas) {
    thread_local ThreadHandles handles;
    int device = 0;
    const cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) {
        throw Error(ErrorKind::kUnsupported,
                    std::string(op) + ": no current GPU: " + cudaGetErrorString(status));
    }
    Handle& handle = handles.by_device[device];
    if (handle == nullptr) handle = HandlePool::instance().take(device);
    if (handle == nullptr) {
        Handle fresh = nullptr;
        require_success(op, cublas, "cublasCreate", cublas.create(&fresh));
        require_success(op, cublas, "cublasSetMathMode", cublas.set_math_mode(fresh, kMathMode));
        handle = fresh;
    }
    return handle;
}

bool is_supported(DType a, DType b, DType c) {
    return is_float(a) && a == b && (c == a || c == DType::kFloat32);
}

cudaDataType_t to_cuda(DType dtype) {
    switch (dtype) {
        case DType::kBFloat16: return CUDA_R_16BF;
        case DType::kFloat16: return CUDA_R_16F;
        default: return CUDA_R_32F;
    }
}

int to_int(const char* op, const char* what, int64_t value) {
    if (value < 0 || value > std::numeric_limits<int>::max()) {
        throw Error(ErrorKind::kUnsupported,
                    std::string(op) + ": a matrix product by cuBLAS: " + what +
                        ": expected less than 2^31, got " + std::to_string(value));
    }
    return static_cast<int>(value);
}

/// The stride of a row-major matrix with `columns` stored columns; cuBLAS wants at least 1, also
/// where nothing is stored.
int leading_dimension(const char* op, const char* what, int64_t stride, int64_t columns) {
    if (stride < columns) {
        throw Error(ErrorKind::kValue, std::string(op) + ": a matrix product by cuBLAS: " + what +
                                           ": expected at least " + std::to_string(columns) +
                                           " columns, got " + std::to_string(stride));
    }
    return to_int(op, what, std::max<int64_t>(stride, 1));
}

}  // namespace

void gemm(const char* op, void* stream, int64_t m, int64_t n, int64_t k, float alpha, GemmOperand a,
          GemmOperand b, float beta, void* c, DType c_dtype, int64_t c_stride,
          GemmWorkspace workspace) {
    if (!is_supported(a.dtype, b.dtype, c_dtype)) {
        throw Error(ErrorKind::kUnsupported,
                    std::string(op) + ": no matrix product of " + name(a.dtype) + " and " +
                        name(b.dtype) + " into " + name(c_dtype) +
                        "; supported on cuda: both operands float32, bfloat16 or float16 alike, "
                        "into their own dtype or float32");
    }
    const int rows = to_int(op, "rows", m), columns = to_int(op, "columns", n);
    const int depth = to_int(op, "depth", k);
    const int lda = leading_dimension(op, "stride of A", a.stride, a.transposed ? m : k);
    const int ldb = leading_dimension(op, "stride of B", b.stride, b.transposed ? k : n);
    const int ldc = leading_dimension(op, "stride of C", c_stride, n);
    if (m == 0 || n == 0) return;
    if (k == 0 && beta == 0) {  // an empty sum; whether BLAS then writes C is not agreed on
        const size_t element = c_dtype == DType::kFloat32 ? 4 : 2;
        const cudaError_t status = cudaMemset2DAsync(
            c, static_cast<size_t>(ldc) * element, 0, static_cast<size_t>(n) * element,
            static_cast<size_t>(m), static_cast<cudaStream_t>(stream));
        if (status != cudaSuccess) {
            throw Error(ErrorKind::kUnsupported,
                        std::string(op) + ": clearing failed: " + cudaGetErrorString(status));
        }
        return;
    }

    const Cublas& cublas = cublas_for(op);
    Handle handle = current_handle(op, cublas);
    // Setting the stream takes away the workspace of the call before.
    require_success(op, cublas, "cublasSetStream",
                    cublas.set_stream(handle, static_cast<cudaStream_t>(stream)));
    if (workspace.data != nullptr) {
        require_success(
            op, cublas, "cublasSetWorkspace",
            cublas.set_workspace(handle, workspace.data, static_cast<size_t>(workspace.bytes)));
    }
    // cuBLAS is column-major: it sees the transpose of every stored matrix, so it is asked for
    // C^T [n, m] = B^T A^T. What is stored as B [k, n] looks to it like the B^T it needs.
    const auto operation = [](const GemmOperand& operand) {
        return operand.transposed ? kTranspose : kNoTranspose;
    };
    require_success(op, cublas, "cublasGemmEx",
                    cublas.gemm(handle, operation(b), operation(a), columns, rows, depth, &alpha,
                                b.data, to_cuda(b.dtype), ldb, a.data, to_cuda(a.dtype), lda, &beta,
                                c, to_cuda(c_dtype), ldc, kComputeFloat32, kDefaultAlgorithm));
}

}  // namespace lemo::cuda
