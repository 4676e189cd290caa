// linear_cross_entropy on CUDA: two products by cuBLAS a segment, one pass over its logits between.
//
// A row of logits is read from memory once and written once: registers and shared memory hold it
// between the sum of its exponentials and its gradient. What does not fit is read again.
#include "lemo/linear_cross_entropy.h"

#include <algorithm>
#include <limits>
#include <string>

#include <cutlass/numeric_conversion.h>

#include "common/cublas.h"
#include "common/launch.h"
#include "common/reduce.h"
#include "common/tensor_core.h"
#include "common/vector.h"

namespace lemo {
namespace {

constexpr char kOp[] = "linear_cross_entropy";

// One block a row. 512 threads leave 64 registers each for two blocks on an SM, where rows are
// short enough for that.
constexpr int kThreads = 512;
// 16-byte vectors that a thread holds in registers, and that it stashes at a time.
constexpr int kBatch = 4;
constexpr int kBatchBytes = kBatch * kThreads * 16;
// Batches in 227 KiB, the most shared memory that a block has on any GPU.
constexpr int kMaxStashed = 7;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <typename T>
constexpr int kElements = 16 / sizeof(T);

template <typename T>
using Vector = cutlass::AlignedArray<T, kElements<T>>;

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// Starts copying the first `bytes` <= 16 bytes at `from` to shared memory; the rest become zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
}

/// Waits until at most `pending` of this thread's committed groups are under way.
__device__ __forceinline__ void wait_copies(int pending) {
    static_assert(kMaxStashed == 7, "one case for each number of groups still wanted later");
    switch (pending) {
        case 6: return cuda::wait_copies<6>();
        case 5: return cuda::wait_copies<5>();
        case 4: return cuda::wait_copies<4>();
        case 3: return cuda::wait_copies<3>();
        case 2: return cuda::wait_copies<2>();
        case 1: return cuda::wait_copies<1>();
        default: return cuda::wait_copies<0>();
    }
}

struct RowArguments {
    int64_t vocabulary;
    int64_t stride;     // of a row of logits, a multiple of 16 bytes
    const float* bias;  // [stride]; null: no bias
    const int64_t* labels;
    int64_t ignore_index;
    float* losses;
    int num_stashed;  // batches that the launch's shared memory holds
};

/// One row of logits as one thread sees it: kBatch vectors of every batch. Batch 0 stays in
/// registers, batches 1 to num_stashed in shared memory, the others are read again when wanted.
template <typename T>
class RowOfLogits {
public:
    __device__ RowOfLogits(T* logits, const RowArguments& args, Vector<T>* stash)
        : logits_(logits),
          bias_(args.bias),
          stash_(stash),
          vocabulary_(static_cast<int>(args.vocabulary)),
          num_batches_(ceil_div<int>(vocabulary_, kBatch * kThreads * kElements<T>)),
          num_stashed_(min(args.num_stashed, num_batches_ - 1)) {}

    __device__ int num_batches() const { return num_batches_; }

    /// Starts all copies into shared memory and loads batch 0.
    __device__ __forceinline__ void start() {
        for (int batch = 1; batch <= num_stashed_; ++batch) {
            CUTLASS_PRAGMA_UNROLL
            for (int v = 0; v < kBatch; ++v) {
                const int first = column(batch, v);
                const int words = min(kElements<T>, vocabulary_ - first);
                if (words > 0) copy_async(slot(batch, v), logits_ + first, words * sizeof(T));
            }
            cuda::commit_copies();
        }
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kBatch; ++v) {
            if (column(0, v) < vocabulary_) held_[v] = load(column(0, v));
        }
    }

    /// Waits for this thread's copies of a batch; batches are waited for in ascending order.
    __device__ __forceinline__ void wait_for(int batch) const {
        if (batch >= 1 && batch <= num_stashed_) wait_copies(num_stashed_ - batch);
    }

    /// use(values, first) for the vectors of a batch: fp32 logits with their bias from column
    /// `first` on, -inf behind the last word.
    template <typename Use>
    __device__ __forceinline__ void visit(int batch, Use&& use) const {
        Vector<T> vectors[kBatch];
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kBatch; ++v) {
            const int first = column(batch, v);
            if (batch == 0) {
                vectors[v] = held_[v];
            } else if (first < vocabulary_) {
                vectors[v] = batch <= num_stashed_ ? *slot(batch, v) : load(first);
            }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kBatch; ++v) {
            const int first = column(batch, v);
            if (first >= vocabulary_) continue;
            float values[kElements<T>];
            to_float(values, vectors[v], first);
            use(values, first);
        }
    }

private:
    __device__ static int column(int batch, int v) {
        return ((batch * kBatch + v) * kThreads + static_cast<int>(threadIdx.x)) * kElements<T>;
    }

    // A thread reads back only what it put there itself, so no barrier guards the stash.
    __device__ Vector<T>* slot(int batch, int v) const {
        return stash_ + ((batch - 1) * kBatch + v) * kThreads + threadIdx.x;
    }

    __device__ __forceinline__ Vector<T> load(int first) const {
        if (first + kElements<T> <= vocabulary_) {
            return cuda::load_vector<kElements<T>>(logits_ + first);
        }
        Vector<T> vector;
        vector.clear();  // what lies behind the last word was never written
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < kElements<T>; ++e) {
            if (first + e < vocabulary_) vector[e] = logits_[first + e];
        }
        return vector;
    }

    __device__ __forceinline__ void to_float(float (&values)[kElements<T>],
                                             const Vector<T>& vector, int first) const {
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < kElements<T>; ++e) values[e] = float(vector[e]);
        if (bias_ != nullptr) {
            CUTLASS_PRAGMA_UNROLL
            for (int part = 0; part < kElements<T>; part += 4) {
                const auto offsets = cuda::load_vector<4>(bias_ + first + part);
                CUTLASS_PRAGMA_UNROLL
                for (int e = 0; e < 4; ++e) values[part + e] += offsets[e];
            }
        }
        if (first + kElements<T> > vocabulary_) {
            CUTLASS_PRAGMA_UNROLL
            for (int e = 0; e < kElements<T>; ++e) {
                if (first + e >= vocabulary_) values[e] = -kInfinity;
            }
        }
    }

    T* logits_;
    const float* bias_;
    Vector<T>* stash_;
    int vocabulary_, num_batches_, num_stashed_;
    Vector<T> held_[kBatch];
};

/// The largest logit so far and the sum of exp(logit - top).
struct SoftmaxSum {
    float top = -kInfinity;
    float sum = 0;

    template <int n>
    __device__ __forceinline__ void add(const float (&logits)[n]) {
        float largest = logits[0];
        CUTLASS_PRAGMA_UNROLL
        for (int e = 1; e < n; ++e) largest = fmaxf(largest, logits[e]);
        if (largest > top) {
            sum *= exp2_approximate((top - largest) * kLog2E);
            top = largest;
        }
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < n; ++e) sum += exp2_approximate((logits[e] - shift()) * kLog2E);
    }

    /// What is subtracted from a logit: where all are -inf so far, -inf - top would be NaN.
    __device__ __forceinline__ float shift() const { return top == -kInfinity ? 0.0f : top; }
};

template <typename T>
__device__ void fill_row(T* row, int64_t stride, float value) {
    Vector<T> vector;
    vector.fill(T(value));
    for (int64_t i = threadIdx.x * kElements<T>; i < stride; i += kThreads * kElements<T>) {
        cuda::store_vector<kElements<T>>(row + i, vector);
    }
}

/// Cross entropy of one row a block; with kGradient the row becomes softmax - one_hot(label), 0
/// where the label is ignored and NaN where it is no word.
template <typename T, bool kGradient>
__global__ void __launch_bounds__(kThreads, 2)
row_loss_kernel(T* __restrict__ logits, RowArguments args) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    __shared__ float scratch[cuda::kReduceScratch];

    const int64_t row_idx = blockIdx.x, label = args.labels[row_idx];
    T* to = logits + row_idx * args.stride;
    if (label == args.ignore_index || label < 0 || label >= args.vocabulary) {
        const float value = label == args.ignore_index ? 0.0f : kNan;
        if (threadIdx.x == 0) args.losses[row_idx] = value;
        if constexpr (kGradient) fill_row(to, args.stride, value);
        return;
    }
    RowOfLogits<T> row(to, args, reinterpret_cast<Vector<T>*>(shared_memory));
    row.start();
    // Every thread reads it before the reductions below, one overwrites it after them.
    const float picked = float(to[label]) + (args.bias != nullptr ? args.bias[label] : 0.0f);

    SoftmaxSum softmax;
    for (int batch = 0; batch < row.num_batches(); ++batch) {
        row.wait_for(batch);
        row.visit(batch, [&](const auto& values, int) { softmax.add(values); });
    }
    SoftmaxSum whole;
    whole.top = cuda::block_max<kThreads>(softmax.top, scratch);
    const float base = whole.shift();
    // A thread without a word has the factor exp2(-inf) = 0.
    whole.sum = cuda::block_sum<kThreads>(
        softmax.sum * exp2_approximate((softmax.top - base) * kLog2E), scratch);
    if (threadIdx.x == 0) args.losses[row_idx] = logf(whole.sum) - (picked - base);

    if constexpr (kGradient) {
        const float factor = 1.0f / whole.sum;
        const int word = static_cast<int>(label);
        // Backwards: what is read again was read last and may still be in a cache.
        for (int batch = row.num_batches() - 1; batch >= 0; --batch) {
            row.visit(batch, [&](const auto& values, int first) {
                cutlass::Array<float, kElements<T>> gradient;
                CUTLASS_PRAGMA_UNROLL
                for (int e = 0; e < kElements<T>; ++e) {
                    gradient[e] = exp2_approximate((values[e] - base) * kLog2E) * factor -
                                  (first + e == word ? 1.0f : 0.0f);
                }
                Vector<T> rounded;
                static_cast<cutlass::Array<T, kElements<T>>&>(rounded) =
                    cutlass::NumericArrayConverter<T, float, kElements<T>>::convert(gradient);
                cuda::store_vector<kElements<T>>(to + first, rounded);
            });
        }
    }
}

constexpr int kFinishThreads = 1024;

/// Sums the rows' losses and counts the labels; one block, so the order is fixed.
__global__ void __launch_bounds__(kFinishThreads)
finish_loss_kernel(const float* __restrict__ losses, const int64_t* __restrict__ labels,
                   int64_t num_rows, int64_t ignore_index, float* loss, int64_t* count) {
    __shared__ double loss_scratch[cuda::kReduceScratch];
    __shared__ int64_t count_scratch[cuda::kReduceScratch];
    double sum = 0;
    int64_t used = 0;
    for (int64_t r = threadIdx.x; r < num_rows; r += kFinishThreads) {
        sum += losses[r];
        used += labels[r] != ignore_index ? 1 : 0;
    }
    sum = cuda::block_sum<kFinishThreads>(sum, loss_scratch);
    used = cuda::block_sum<kFinishThreads>(used, count_scratch);
    if (threadIdx.x != 0) return;
    *loss = static_cast<float>(sum);
    *count = used;
}

// A block of column_sums_kernel owns this many vectors of columns and splits the rows in parts.
constexpr int kSumVectors = 32;
constexpr int kSumParts = 8;

/// sums[c] (+)= sum over rows of gradient[:, c], in a fixed order. Adds to what is there if `add`.
template <typename T>
__global__ void __launch_bounds__(kSumVectors * kSumParts)
column_sums_kernel(const T* __restrict__ gradient, int64_t num_rows, int64_t num_columns,
                   int64_t stride, bool add, float* __restrict__ sums) {
    __shared__ float parts[kSumParts][kSumVectors][kElements<T>];
    const int vector_idx = threadIdx.x % kSumVectors, part = threadIdx.x / kSumVectors;
    const int64_t first = (int64_t{blockIdx.x} * kSumVectors + vector_idx) * kElements<T>;

    float sum[kElements<T>] = {};
    if (first < num_columns) {  // then the whole vector lies within the stride
        for (int64_t r = part; r < num_rows; r += kSumParts) {
            const auto vector = cuda::load_vector<kElements<T>>(gradient + r * stride + first);
            CUTLASS_PRAGMA_UNROLL
            for (int e = 0; e < kElements<T>; ++e) sum[e] += float(vector[e]);
        }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < kElements<T>; ++e) parts[part][vector_idx][e] = sum[e];
    __syncthreads();
    if (part != 0) return;
    for (int e = 0; e < kElements<T> && first + e < num_columns; ++e) {
        float total = add ? sums[first + e] : 0.0f;
        for (int p = 0; p < kSumParts; ++p) total += parts[p][vector_idx][e];
        sums[first + e] = total;
    }
}

constexpr int kCopyThreads = 256;
constexpr int64_t kCopyBlocks = 4096;  // of a grid-stride copy, at most

/// Rows of hidden with zeros where the label is ignored: such a row may hold anything, and 0 * NaN
/// would reach the weight's gradient.
template <typename T>
__global__ void __launch_bounds__(kCopyThreads)
copy_used_rows_kernel(const T* __restrict__ from, const int64_t* __restrict__ labels,
                      int64_t ignore_index, int64_t hidden, T* __restrict__ to) {
    const int64_t row_idx = blockIdx.x, start = row_idx * hidden;
    const bool used = labels[row_idx] != ignore_index;
    for (int64_t i = threadIdx.x; i < hidden; i += kCopyThreads) {
        to[start + i] = used ? from[start + i] : T(0.0f);
    }
}

/// to[i] = from[i] for i < size, 0 up to padded_size.
template <typename From, typename To>
__global__ void __launch_bounds__(kCopyThreads)
convert_kernel(const From* __restrict__ from, int64_t size, To* __restrict__ to,
               int64_t padded_size) {
    for (int64_t i = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x; i < padded_size;
         i += int64_t{gridDim.x} * kCopyThreads) {
        to[i] = i < size ? To(float(from[i])) : To(0.0f);
    }
}

template <typename From, typename To>
void convert(const From* from, int64_t size, To* to, int64_t padded_size, cudaStream_t stream) {
    if (padded_size == 0) return;
    const int64_t blocks = std::min(ceil_div<int64_t>(padded_size, kCopyThreads), kCopyBlocks);
    convert_kernel<<<static_cast<unsigned>(blocks), kCopyThreads, 0, stream>>>(from, size, to,
                                                                               padded_size);
    cuda::check_launch(kOp);
}

void clear(const Tensor& tensor, cudaStream_t stream) {
    const int64_t bytes = tensor.num_elements() * (tensor.dtype == DType::kFloat32 ? 4 : 2);
    if (bytes == 0) return;
    cudaMemsetAsync(tensor.data, 0, static_cast<size_t>(bytes), stream);
    cuda::check_launch(kOp);
}

void require_supported(const LinearCrossEntropyParams& p) {
    const Checker check(kOp);
    check.that(p.hidden.dtype == p.weight.dtype, "weight",
               std::string("the dtype of 'hidden' (") + name(p.hidden.dtype) +
                   ") on cuda, where the product is cuBLAS's",
               name(p.weight.dtype), ErrorKind::kUnsupported);
    check.that(p.weight.size(0) <= 1 << 30, "weight", "a vocabulary of at most 2^30 on cuda",
               std::to_string(p.weight.size(0)), ErrorKind::kUnsupported);
}

/// Where everything lies in the scratch memory, in bytes from its start.
struct ScratchPlan {
    int64_t segment;  // rows
    int64_t stride;   // of logits, in elements
    int64_t logits, losses, bias, hidden, dweight, dbias, workspace;
    int64_t bytes = 0;

    explicit ScratchPlan(const LinearCrossEntropyParams& p) {
        const int64_t rows = p.hidden.size(0), hidden_size = p.hidden.size(1);
        const int64_t vocabulary = p.weight.size(0);
        const int64_t element = p.hidden.dtype == DType::kFloat32 ? 4 : 2;
        segment = std::min(p.chunk_rows, rows);
        stride = cuda::round_up(vocabulary, 16 / element);
        logits = take(segment * stride * element);
        losses = take(rows * 4);
        bias = take(p.bias ? stride * 4 : 0);
        hidden = take(p.dweight ? segment * hidden_size * element : 0);
        dweight = take(sums_weight_apart(p) ? vocabulary * hidden_size * 4 : 0);
        dbias = take(p.dbias ? vocabulary * 4 : 0);
        workspace = take(cuda::kGemmWorkspaceBytes);
    }

    /// Segments add to fp32 sums, rounded once at the end. A gradient of fp32 is its own sum, and
    /// a single segment needs none.
    static bool sums_weight_apart(const LinearCrossEntropyParams& p) {
        return p.dweight && p.dweight.dtype != DType::kFloat32 &&
               p.chunk_rows < p.hidden.size(0);
    }

private:
    int64_t take(int64_t size) {
        const int64_t offset = bytes;
        bytes += cuda::round_up(size, 256);
        return offset;
    }
};

template <typename T>
class SegmentedLoss {
public:
    SegmentedLoss(const LinearCrossEntropyParams& params, cudaStream_t stream)
        : params_(params),
          plan_(params),
          stream_(stream),
          rows_(params.hidden.size(0)),
          hidden_size_(params.hidden.size(1)),
          vocabulary_(params.weight.size(0)),
          has_gradient_(params.dhidden || params.dweight || params.dbias) {}

    void run() {
        load_bias();
        clear_padding();
        plan_shared_memory();
        for (int64_t first = 0; first < rows_; first += plan_.segment) {
            const int64_t rows = std::min(plan_.segment, rows_ - first);
            compute_logits(first, rows);
            compute_losses(first, rows);
            if (params_.dhidden) store_hidden_gradient(first, rows);
            if (params_.dweight) add_weight_gradient(first, rows);
            if (params_.dbias) add_bias_gradient(first, rows);
        }
        finish_loss_kernel<<<1, kFinishThreads, 0, stream_>>>(
            at<float>(plan_.losses), params_.labels.as<const int64_t>(), rows_,
            params_.ignore_index, params_.loss.as<float>(), params_.count.as<int64_t>());
        cuda::check_launch(kOp);
        finish_weight_gradients();
    }

private:
    template <typename U>
    U* at(int64_t offset) const {
        return reinterpret_cast<U*>(static_cast<unsigned char*>(params_.scratch) + offset);
    }

    T* logits() const { return at<T>(plan_.logits); }
    const T* hidden(int64_t row) const {
        return params_.hidden.as<const T>() + row * hidden_size_;
    }

    void gemm(int64_t m, int64_t n, int64_t k, cuda::GemmOperand a, cuda::GemmOperand b,
              float beta, void* c, DType c_dtype, int64_t c_stride) const {
        cuda::gemm(kOp, stream_, m, n, k, 1.0f, a, b, beta, c, c_dtype, c_stride,
                   {at<void>(plan_.workspace), cuda::kGemmWorkspaceBytes});
    }

    /// The bias in fp32, padded to the stride so that its vectors can be loaded as the logits' are.
    void load_bias() {
        if (!params_.bias) return;
        cuda::dispatch_float(params_.bias.dtype, [&]<typename B>(B) {
            convert(params_.bias.as<const B>(), vocabulary_, at<float>(plan_.bias), plan_.stride,
                    stream_);
        });
    }

    void plan_shared_memory() {
        int device = 0, most = 0;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        constexpr int kStaticBytes = cuda::kReduceScratch * sizeof(float);
        // Without a gradient nothing is kept: half of the memory, so that two rows share an SM.
        const int fitting = (has_gradient_ ? most : most / 2) - kStaticBytes;
        const int64_t batches =
            ceil_div<int64_t>(vocabulary_, kBatch * kThreads * kElements<T>);
        num_stashed_ = static_cast<int>(
            std::min<int64_t>({batches - 1, fitting / kBatchBytes, kMaxStashed}));
        const auto reserve = [&](auto* kernel) {
            cuda::reserve_shared_memory(kOp, kernel, shared_bytes());
        };
        if (has_gradient_) {
            reserve(row_loss_kernel<T, true>);
        } else {
            reserve(row_loss_kernel<T, false>);
        }
    }

    size_t shared_bytes() const { return static_cast<size_t>(num_stashed_) * kBatchBytes; }

    /// Vectors reach beyond the last word, where no product writes; what lies there is masked.
    void clear_padding() const {
        if (plan_.stride == vocabulary_ || rows_ == 0) return;
        const auto bytes = [](int64_t count) { return static_cast<size_t>(count) * sizeof(T); };
        cuda::check_status(kOp, cudaMemset2DAsync(logits() + vocabulary_, bytes(plan_.stride), 0,
                                                  bytes(plan_.stride - vocabulary_),
                                                  static_cast<size_t>(plan_.segment), stream_));
    }

    void compute_logits(int64_t first, int64_t rows) const {
        const DType dtype = params_.hidden.dtype;
        gemm(rows, vocabulary_, hidden_size_, {hidden(first), dtype, hidden_size_, false},
             {params_.weight.data, dtype, hidden_size_, true}, 0, logits(), dtype, plan_.stride);
    }

    void compute_losses(int64_t first, int64_t rows) const {
        const RowArguments args{vocabulary_,
                                plan_.stride,
                                params_.bias ? at<const float>(plan_.bias) : nullptr,
                                params_.labels.as<const int64_t>() + first,
                                params_.ignore_index,
                                at<float>(plan_.losses) + first,
                                num_stashed_};
        const auto grid = static_cast<unsigned>(rows);
        if (has_gradient_) {
            row_loss_kernel<T, true><<<grid, kThreads, shared_bytes(), stream_>>>(logits(), args);
        } else {
            row_loss_kernel<T, false><<<grid, kThreads, shared_bytes(), stream_>>>(logits(), args);
        }
        cuda::check_launch(kOp);
    }

    void store_hidden_gradient(int64_t first, int64_t rows) const {
        const DType dtype = params_.hidden.dtype;
        gemm(rows, hidden_size_, vocabulary_, {logits(), dtype, plan_.stride, false},
             {params_.weight.data, dtype, hidden_size_, false}, 0,
             params_.dhidden.as<T>() + first * hidden_size_, dtype, hidden_size_);
    }

    void add_weight_gradient(int64_t first, int64_t rows) const {
        T* used_hidden = at<T>(plan_.hidden);
        copy_used_rows_kernel<<<static_cast<unsigned>(rows), kCopyThreads, 0, stream_>>>(
            hidden(first), params_.labels.as<const int64_t>() + first, params_.ignore_index,
            hidden_size_, used_hidden);
        cuda::check_launch(kOp);
        const bool apart = ScratchPlan::sums_weight_apart(params_);
        const DType dtype = params_.hidden.dtype;
        gemm(vocabulary_, hidden_size_, rows, {logits(), dtype, plan_.stride, true},
             {used_hidden, dtype, hidden_size_, false}, first == 0 ? 0.0f : 1.0f,
             apart ? at<void>(plan_.dweight) : params_.dweight.data,
             apart ? DType::kFloat32 : dtype, hidden_size_);
    }

    void add_bias_gradient(int64_t first, int64_t rows) const {
        const auto grid = static_cast<unsigned>(
            ceil_div<int64_t>(vocabulary_, kSumVectors * kElements<T>));
        column_sums_kernel<<<grid, kSumVectors * kSumParts, 0, stream_>>>(
            logits(), rows, vocabulary_, plan_.stride, first > 0, at<float>(plan_.dbias));
        cuda::check_launch(kOp);
    }

    void finish_weight_gradients() const {
        if (rows_ == 0) {
            if (params_.dweight) clear(params_.dweight, stream_);
            if (params_.dbias) clear(params_.dbias, stream_);
            return;
        }
        const auto round = [&](const Tensor& gradient, int64_t sums) {
            const int64_t size = gradient.num_elements();
            cuda::dispatch_float(gradient.dtype, [&]<typename To>(To) {
                convert(at<const float>(sums), size, gradient.as<To>(), size, stream_);
            });
        };
        if (ScratchPlan::sums_weight_apart(params_)) round(params_.dweight, plan_.dweight);
        if (params_.dbias) round(params_.dbias, plan_.dbias);
    }

    const LinearCrossEntropyParams& params_;
    const ScratchPlan plan_;
    const cudaStream_t stream_;
    const int64_t rows_, hidden_size_, vocabulary_;
    const bool has_gradient_;
    int num_stashed_ = 0;
};

}  // namespace

int64_t linear_cross_entropy_scratch_bytes(const LinearCrossEntropyParams& params) {
    require_supported(params);
    return ScratchPlan(params).bytes;
}

void linear_cross_entropy_cuda(const LinearCrossEntropyParams& params, void* stream) {
    require_supported(params);
    cuda::dispatch_float(params.hidden.dtype, [&]<typename T>(T) {
        SegmentedLoss<T>(params, static_cast<cudaStream_t>(stream)).run();
    });
}

}  // namespace lemo
