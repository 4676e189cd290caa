// Small kernels of linear_cross_entropy beside the softmax: sums over the rows of a loss chunk,
// copies and conversions.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/vector.h"
#include "linear_cross_entropy/portable/loss_rows.h"

namespace lemo::cuda::linear_cross_entropy::portable {

// A block of column_sums_kernel owns this many vectors of columns and splits the rows in parts.
constexpr int kSumVectors = 32;
constexpr int kSumParts = 8;

/// sums[c] (+)= sum over rows of gradient[:, c], in a fixed order. Adds to what is there if `add`.
template <typename T>
__global__ void
__launch_bounds__(kSumVectors * kSumParts)
column_sums_kernel(const T* __restrict__ gradient, int64_t num_rows, int64_t num_columns,
                   int64_t stride, bool add, float* __restrict__ sums) {
    __shared__ float parts[kSumParts][kSumVectors][kElements<T>];
    const int vector_idx = threadIdx.x % kSumVectors, part = threadIdx.x / kSumVectors;
    const int64_t first = (int64_t{blockIdx.x} * kSumVectors + vector_idx) * kElements<T>;

    float sum[kElements<T>] = {};
    if (first < num_columns) {  // then the whole vector lies within the stride
        for (int64_t r = part; r < num_rows; r += kSumParts) {
            const auto vector = load_vector<kElements<T>>(gradient + r * stride + first);
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
    check_launch("linear_cross_entropy");
}

}  // namespace lemo::cuda::linear_cross_entropy::portable
