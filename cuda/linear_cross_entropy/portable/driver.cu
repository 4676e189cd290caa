#include "linear_cross_entropy/portable/driver.h"

#include <algorithm>
#include <cstddef>

#include "common/arena.h"
#include "common/cublas.h"
#include "common/launch.h"
#include "linear_cross_entropy/portable/gradient_sums.h"
#include "linear_cross_entropy/portable/loss_rows.h"

namespace lemo::cuda::linear_cross_entropy::portable {
namespace {

constexpr char kOp[] = "linear_cross_entropy";

constexpr int kFinishThreads = 1024;

/// Sums the rows' losses and counts the labels; one block, so the order is fixed.
__global__ void
__launch_bounds__(kFinishThreads)
finish_loss_kernel(const float* __restrict__ losses, const int64_t* __restrict__ labels,
                   int64_t num_rows, int64_t ignore_index, float* loss, int64_t* count) {
    __shared__ double loss_scratch[kReduceScratch];
    __shared__ int64_t count_scratch[kReduceScratch];
    double sum = 0;
    int64_t used = 0;
    for (int64_t r = threadIdx.x; r < num_rows; r += kFinishThreads) {
        sum += losses[r];
        used += labels[r] != ignore_index ? 1 : 0;
    }
    sum = block_sum<kFinishThreads>(sum, loss_scratch);
    used = block_sum<kFinishThreads>(used, count_scratch);
    if (threadIdx.x != 0) return;
    *loss = static_cast<float>(sum);
    *count = used;
}

void clear(const Tensor& tensor, cudaStream_t stream) {
    const int64_t bytes = tensor.num_elements() * size_of(tensor.dtype);
    if (bytes == 0) return;
    check_status(kOp, cudaMemsetAsync(tensor.data, 0, static_cast<size_t>(bytes), stream));
}

/// Scratch of a call.
struct Scratch {
    int64_t chunk_rows;
    int64_t stride;  // of logits, in elements
    // Loss chunks add to fp32 sums, rounded once at the end. A gradient of fp32 is its own sum, and
    // a single chunk needs none.
    bool sums_weight_apart;
    void* logits;
    float* losses;
    float* bias;
    void* used_hidden;
    float* dweight;
    float* dbias;
    std::byte* gemm_workspace;

    Scratch(const LinearCrossEntropyParams& p, Arena& arena) {
        const int64_t rows = p.hidden.size(0), hidden_size = p.hidden.size(1);
        const int64_t vocabulary = p.weight.size(0), element = size_of(p.hidden.dtype);
        chunk_rows = std::min(p.chunk_rows, rows);
        stride = round_up(vocabulary, 16 / element);
        sums_weight_apart =
            p.dweight && p.dweight.dtype != DType::kFloat32 && p.chunk_rows < rows;
        logits = arena.take<std::byte>(chunk_rows * stride * element);
        losses = arena.take<float>(rows);
        bias = arena.take<float>(p.bias ? stride : 0);
        used_hidden = arena.take<std::byte>(p.dweight ? chunk_rows * hidden_size * element : 0);
        dweight = arena.take<float>(sums_weight_apart ? vocabulary * hidden_size : 0);
        dbias = arena.take<float>(p.dbias ? vocabulary : 0);
        gemm_workspace = arena.take<std::byte>(kGemmWorkspaceBytes);
    }
};

template <typename T>
class ChunkedLoss {
public:
    ChunkedLoss(const LinearCrossEntropyParams& params, cudaStream_t stream)
        : params_(params),
          arena_(params.scratch),
          scratch_(params, arena_),
          stream_(stream),
          rows_(params.hidden.size(0)),
          hidden_size_(params.hidden.size(1)),
          vocabulary_(params.weight.size(0)),
          has_gradient_(params.dhidden || params.dweight || params.dbias) {}

    void run() {
        load_bias();
        clear_padding();
        plan_shared_memory();
        for (int64_t first = 0; first < rows_; first += scratch_.chunk_rows) {
            const int64_t rows = std::min(scratch_.chunk_rows, rows_ - first);
            compute_logits(first, rows);
            compute_losses(first, rows);
            if (params_.dhidden) store_hidden_gradient(first, rows);
            if (params_.dweight) add_weight_gradient(first, rows);
            if (params_.dbias) add_bias_gradient(first, rows);
        }
        finish_loss_kernel<<<1, kFinishThreads, 0, stream_>>>(
            scratch_.losses, params_.labels.as<const int64_t>(), rows_, params_.ignore_index,
            params_.loss.as<float>(), params_.count.as<int64_t>());
        check_launch(kOp);
        finish_weight_gradients();
    }

private:
    T* logits() const { return static_cast<T*>(scratch_.logits); }
    const T* hidden(int64_t row) const {
        return params_.hidden.as<const T>() + row * hidden_size_;
    }

    void gemm(int64_t m, int64_t n, int64_t k, GemmOperand a, GemmOperand b,
              float beta, void* c, DType c_dtype, int64_t c_stride) const {
        cuda::gemm(kOp, stream_, m, n, k, 1.0f, a, b, beta, c, c_dtype, c_stride,
                   {scratch_.gemm_workspace, kGemmWorkspaceBytes});
    }

    /// The bias in fp32, padded to the stride so that its vectors can be loaded as the logits' are.
    void load_bias() {
        if (!params_.bias) return;
        dispatch_float(params_.bias.dtype, [&]<typename B>(B) {
            convert(params_.bias.as<const B>(), vocabulary_, scratch_.bias, scratch_.stride,
                    stream_);
        });
    }

    void plan_shared_memory() {
        const int most = current_gpu(kOp).block_shared_bytes;
        constexpr int kStaticBytes = kReduceScratch * sizeof(float);
        // Without a gradient nothing is kept: half of the memory, so that two rows share an SM.
        const int fitting = (has_gradient_ ? most : most / 2) - kStaticBytes;
        const int64_t batches =
            ceil_div<int64_t>(vocabulary_, kBatch * kThreads * kElements<T>);
        num_stashed_ = static_cast<int>(
            std::min<int64_t>({batches - 1, fitting / kBatchBytes, kMaxStashed}));
        const auto reserve = [&](auto* kernel) {
            reserve_shared_memory(kOp, kernel, shared_bytes());
        };
        if (has_gradient_) {
            reserve(row_loss_kernel<T, true>);
        } else {
            reserve(row_loss_kernel<T, false>);
        }
    }

    size_t shared_bytes() const { return static_cast<size_t>(num_stashed_) * kBatchBytes; }

    /// Vectors reach beyond the last word, where cuBLAS writes nothing; what lies there is masked.
    void clear_padding() const {
        if (scratch_.stride == vocabulary_ || rows_ == 0) return;
        const auto bytes = [](int64_t count) { return static_cast<size_t>(count) * sizeof(T); };
        check_status(kOp, cudaMemset2DAsync(logits() + vocabulary_, bytes(scratch_.stride), 0,
                                            bytes(scratch_.stride - vocabulary_),
                                            static_cast<size_t>(scratch_.chunk_rows), stream_));
    }

    void compute_logits(int64_t first, int64_t rows) const {
        const DType dtype = params_.hidden.dtype;
        gemm(rows, vocabulary_, hidden_size_, {hidden(first), dtype, hidden_size_, false},
             {params_.weight.data, dtype, hidden_size_, true}, 0, logits(), dtype, scratch_.stride);
    }

    void compute_losses(int64_t first, int64_t rows) const {
        const LossRowArguments args{vocabulary_,
                                scratch_.stride,
                                params_.bias ? scratch_.bias : nullptr,
                                params_.labels.as<const int64_t>() + first,
                                params_.ignore_index,
                                scratch_.losses + first,
                                num_stashed_};
        const unsigned grid = grid_x(kOp, "hidden", rows);
        if (has_gradient_) {
            row_loss_kernel<T, true><<<grid, kThreads, shared_bytes(), stream_>>>(logits(), args);
        } else {
            row_loss_kernel<T, false><<<grid, kThreads, shared_bytes(), stream_>>>(logits(), args);
        }
        check_launch(kOp);
    }

    void store_hidden_gradient(int64_t first, int64_t rows) const {
        const DType dtype = params_.hidden.dtype;
        gemm(rows, hidden_size_, vocabulary_, {logits(), dtype, scratch_.stride, false},
             {params_.weight.data, dtype, hidden_size_, false}, 0,
             params_.dhidden.as<T>() + first * hidden_size_, dtype, hidden_size_);
    }

    void add_weight_gradient(int64_t first, int64_t rows) const {
        T* used_hidden = static_cast<T*>(scratch_.used_hidden);
        copy_used_rows_kernel<<<grid_x(kOp, "hidden", rows), kCopyThreads, 0, stream_>>>(
            hidden(first), params_.labels.as<const int64_t>() + first, params_.ignore_index,
            hidden_size_, used_hidden);
        check_launch(kOp);
        const bool apart = scratch_.sums_weight_apart;
        const DType dtype = params_.hidden.dtype;
        gemm(vocabulary_, hidden_size_, rows, {logits(), dtype, scratch_.stride, true},
             {used_hidden, dtype, hidden_size_, false}, first == 0 ? 0.0f : 1.0f,
             apart ? scratch_.dweight : params_.dweight.data,
             apart ? DType::kFloat32 : dtype, hidden_size_);
    }

    void add_bias_gradient(int64_t first, int64_t rows) const {
        const auto grid = static_cast<unsigned>(
            ceil_div<int64_t>(vocabulary_, kSumVectors * kElements<T>));
        column_sums_kernel<<<grid, kSumVectors * kSumParts, 0, stream_>>>(
            logits(), rows, vocabulary_, scratch_.stride, first > 0, scratch_.dbias);
        check_launch(kOp);
    }

    void finish_weight_gradients() const {
        if (rows_ == 0) {
            if (params_.dweight) clear(params_.dweight, stream_);
            if (params_.dbias) clear(params_.dbias, stream_);
            return;
        }
        const auto round = [&](const Tensor& gradient, const float* sums) {
            const int64_t size = gradient.num_elements();
            dispatch_float(gradient.dtype, [&]<typename To>(To) {
                convert(sums, size, gradient.as<To>(), size, stream_);
            });
        };
        if (scratch_.sums_weight_apart) round(params_.dweight, scratch_.dweight);
        if (params_.dbias) round(params_.dbias, scratch_.dbias);
    }

    const LinearCrossEntropyParams& params_;
    Arena arena_;
    const Scratch scratch_;
    const cudaStream_t stream_;
    const int64_t rows_, hidden_size_, vocabulary_;
    const bool has_gradient_;
    int num_stashed_ = 0;
};

}  // namespace

int64_t scratch_bytes(const LinearCrossEntropyParams& params) {
    return count_scratch_bytes<Scratch>(params);
}

void launch(const LinearCrossEntropyParams& params, cudaStream_t stream) {
    dispatch_float(params.hidden.dtype, [&]<typename T>(T) {
        ChunkedLoss<T>(params, stream).run();
    });
}

}  // namespace lemo::cuda::linear_cross_entropy::portable
