// The softmax kernel of linear_cross_entropy: loss and gradient of one row of logits.
//
// A row of logits is read from memory once and written once: registers and shared memory hold it
// between the sum of its exponentials and its gradient. What does not fit is read again.
#pragma once

#include <limits>

#include <cutlass/numeric_conversion.h>

#include "common/async_copy.h"
#include "common/exp2.h"
#include "common/reduce.h"
#include "common/vector.h"
#include "lemo/blocks.h"

namespace lemo::cuda::linear_cross_entropy::portable {

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

/// Waits until at most `pending` of this thread's committed groups are under way.
__device__ __forceinline__ void wait_copies_up_to(int pending) {
    static_assert(kMaxStashed == 7, "one case for each number of groups still wanted later");
    switch (pending) {
        case 6: return wait_copies<6>();
        case 5: return wait_copies<5>();
        case 4: return wait_copies<4>();
        case 3: return wait_copies<3>();
        case 2: return wait_copies<2>();
        case 1: return wait_copies<1>();
        default: return wait_copies<0>();
    }
}

struct LossRowArguments {
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
    __device__ RowOfLogits(T* logits, const LossRowArguments& args, Vector<T>* stash)
        : logits_(logits), bias_(args.bias), stash_(stash),
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
            commit_copies();
        }
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kBatch; ++v) {
            if (column(0, v) < vocabulary_) held_[v] = load(column(0, v));
        }
    }

    /// Waits for this thread's copies of a batch; batches are waited for in ascending order.
    __device__ __forceinline__ void wait_for(int batch) const {
        if (batch >= 1 && batch <= num_stashed_) wait_copies_up_to(num_stashed_ - batch);
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
            return load_vector<kElements<T>>(logits_ + first);
        }
        Vector<T> vector;
        vector.clear();  // what lies behind the last word was never written
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < kElements<T>; ++e) {
            if (first + e < vocabulary_) vector[e] = logits_[first + e];
        }
        return vector;
    }

    __device__ __forceinline__ void to_float(float (&values)[kElements<T>], const Vector<T>& vector,
                                             int first) const {
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < kElements<T>; ++e) values[e] = float(vector[e]);
        if (bias_ != nullptr) {
            CUTLASS_PRAGMA_UNROLL
            for (int part = 0; part < kElements<T>; part += 4) {
                const auto offsets = load_vector<4>(bias_ + first + part);
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
        store_vector<kElements<T>>(row + i, vector);
    }
}

/// Cross entropy of one row a block; with kGradient the row becomes softmax - one_hot(label), 0
/// where the label is ignored and NaN where it is no word.
template <typename T, bool kGradient>
__global__ void
__launch_bounds__(kThreads, 2)
row_loss_kernel(T* __restrict__ logits, LossRowArguments args) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    __shared__ float scratch[kReduceScratch];

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
    whole.top = block_max<kThreads>(softmax.top, scratch);
    const float base = whole.shift();
    // A thread without a word has the factor exp2(-inf) = 0.
    whole.sum = block_sum<kThreads>(
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
                store_vector<kElements<T>>(to + first, rounded);
            });
        }
    }
}

}  // namespace lemo::cuda::linear_cross_entropy::portable
