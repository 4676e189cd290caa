// The kernels of select_norm: a thread block for each kept row, or a warp where rows are narrow;
// the row stays in shared memory between the statistics and the store, so device memory is read
// once.
#pragma once

#include <cuda_runtime.h>

#include "common/float_reader.h"
#include "common/reduce.h"
#include "common/vector.h"

namespace lemo::cuda::select_norm::portable {

// Enough rows fit on a multiprocessor to hide each other's sums; a thread of a row of 4096 bf16
// elements, or of 1024 that a warp takes, loads all its vectors before it uses the first.
constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr int kInFlight = 4;
// One access is 16 bytes of the row's type.
template <typename T>
constexpr int kElements = 16 / static_cast<int>(sizeof(T));

// Columns that one block of the weight-gradient kernel sums, and rows that it reads at a time.
constexpr int kGradColumns = 32;
constexpr int kGradRows = 16;

/// Rows that a thread block takes, kRowThreads threads for each: all of the block, or a warp.
template <int kRowThreads>
constexpr int kBlockRows = kThreads / kRowThreads;

/// The row of this thread, among all and in its block's shared memory, and its place there.
template <int kRowThreads>
struct RowThread {
    int slot = static_cast<int>(threadIdx.x) / kRowThreads;
    int lane = static_cast<int>(threadIdx.x) % kRowThreads;
    int64_t row = int64_t{blockIdx.x} * kBlockRows<kRowThreads> + slot;
};

/// Walks the vectors of a row that a thread owns: `load(i, width)` reads what starts at column i,
/// `use(i, width, loaded)` takes it. kInFlight loads come before the first use, an order that the
/// compiler may not choose by itself where a use stores.
template <int kRowThreads, int kWidth, typename Load, typename Use>
__device__ __forceinline__ void walk_vectors(int lane, int64_t hidden, Load&& load, Use&& use) {
    constexpr Int<kWidth> width;
    for (int64_t first = lane * kWidth; first < hidden; first += kInFlight * kRowThreads * kWidth) {
        decltype(load(first, width)) loaded[kInFlight];
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kInFlight; ++v) {
            const int64_t i = first + v * kRowThreads * kWidth;
            if (i < hidden) loaded[v] = load(i, width);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kInFlight; ++v) {
            const int64_t i = first + v * kRowThreads * kWidth;
            if (i < hidden) use(i, width, loaded[v]);
        }
    }
}

template <int kRowThreads, int kWidth, typename Load, typename Use>
__device__ __forceinline__ void for_each_vector(int lane, int64_t hidden, bool vectorised,
                                                Load&& load, Use&& use) {
    if (vectorised) {
        walk_vectors<kRowThreads, kWidth>(lane, hidden, load, use);
    } else {
        walk_vectors<kRowThreads, 1>(lane, hidden, load, use);
    }
}

/// The sum over the threads of a row, the same bits in each of them, which see afterwards what the
/// others have stored in shared memory.
template <int kRowThreads>
__device__ __forceinline__ float row_sum(float value, float* scratch) {
    if constexpr (kRowThreads == kWarp) {
        __syncwarp();
        return warp_reduce(value, [](float a, float b) { return a + b; });
    } else {
        return block_sum<kRowThreads>(value, scratch);
    }
}

/// What backward reads of one vector of a row.
template <typename T, int n>
struct GradVectors {
    cutlass::AlignedArray<T, n> dy, x, dx;
};

struct NormArguments {
    const int32_t* rows;
    FloatReader weight, bias;
    float eps;
    int64_t num_rows, hidden;
    bool vectorised;
    float* mean;  // null for RMSNorm
    float* rstd;
};

template <typename T, int kRowThreads>
__global__ void
__launch_bounds__(kThreads)
select_norm_kernel(const T* __restrict__ x, T* __restrict__ y, T* __restrict__ x_rows,
                   NormArguments args) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    __shared__ float scratch[kReduceScratch];

    const auto [slot, lane, row_idx] = RowThread<kRowThreads>{};
    if (row_idx >= args.num_rows) return;  // a whole warp, which no other one waits for
    const int64_t hidden = args.hidden;
    T* row = reinterpret_cast<T*>(shared_memory) + slot * round_up(hidden, kElements<T>);
    const T* from = x + (args.rows ? int64_t{args.rows[row_idx]} : row_idx) * hidden;

    float sum = 0;
    const auto load_x = [&](int64_t i, auto width) {
        return load_vector<width()>(from + i);
    };
    for_each_vector<kRowThreads, kElements<T>>(lane, hidden, args.vectorised, load_x,
                                               [&](int64_t i, auto width, const auto& values) {
        store_vector<width()>(row + i, values);
        if (x_rows != nullptr) store_vector<width()>(x_rows + row_idx * hidden + i, values);
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < width(); ++e) {
            const float value = float(values[e]);
            sum += args.mean != nullptr ? value : value * value;
        }
    });
    sum = row_sum<kRowThreads>(sum, scratch);

    float center = 0, squares = sum;
    if (args.mean != nullptr) {
        center = sum / static_cast<float>(hidden);
        squares = 0;
        for (int64_t i = lane; i < hidden; i += kRowThreads) {
            const float value = float(row[i]) - center;
            squares += value * value;
        }
        squares = row_sum<kRowThreads>(squares, scratch);
    }
    const float scale = rsqrtf(squares / static_cast<float>(hidden) + args.eps);
    if (lane == 0) {
        args.rstd[row_idx] = scale;
        if (args.mean != nullptr) args.mean[row_idx] = center;
    }

    const auto load_row = [&](int64_t i, auto width) {
        return load_vector<width()>(row + i);
    };
    for_each_vector<kRowThreads, kElements<T>>(lane, hidden, args.vectorised, load_row,
                                               [&](int64_t i, auto width, auto values) {
        const auto weights = args.weight.load<width()>(i);
        const auto shifts = args.bias.load<width()>(i);
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < width(); ++e) {
            const float normal = (float(values[e]) - center) * scale;
            values[e] = T(normal * weights[e] + shifts[e]);
        }
        store_vector<width()>(y + row_idx * hidden + i, values);
    });
}

struct NormBackwardArguments {
    const int32_t* rows;
    FloatReader weight;
    int64_t num_rows, hidden;
    bool vectorised;
    const float* mean;  // null for RMSNorm
    const float* rstd;
};

template <typename T, int kRowThreads>
__global__ void __launch_bounds__(kThreads)
select_norm_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x_rows,
                            T* __restrict__ dx, NormBackwardArguments args) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    __shared__ float scratch[kReduceScratch];

    const auto [slot, lane, row_idx] = RowThread<kRowThreads>{};
    if (row_idx >= args.num_rows) return;  // a whole warp, which no other one waits for
    const int64_t hidden = args.hidden, shared_row = round_up(hidden, kElements<T>);
    T* dy_row = reinterpret_cast<T*>(shared_memory) + 2 * slot * shared_row;
    T* x_row = dy_row + shared_row;
    T* to = dx + (args.rows ? int64_t{args.rows[row_idx]} : row_idx) * hidden;
    const float center = args.mean != nullptr ? args.mean[row_idx] : 0.0f;
    const float rstd = args.rstd[row_idx];

    float sum_g = 0, sum_gn = 0;  // over g = dy * weight, and over g times the normalised row
    const auto load_saved = [&](int64_t i, auto width) {
        GradVectors<T, width()> vectors;
        vectors.dy = load_vector<width()>(dy + row_idx * hidden + i);
        vectors.x = load_vector<width()>(x_rows + row_idx * hidden + i);
        return vectors;
    };
    for_each_vector<kRowThreads, kElements<T>>(lane, hidden, args.vectorised, load_saved,
                                               [&](int64_t i, auto width, const auto& vectors) {
        const auto& [dys, xs, unused] = vectors;
        store_vector<width()>(dy_row + i, dys);
        store_vector<width()>(x_row + i, xs);
        const auto weights = args.weight.load<width()>(i);
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < width(); ++e) {
            const float g = float(dys[e]) * weights[e];
            sum_g += g;
            sum_gn += g * (float(xs[e]) - center) * rstd;
        }
    });
    const auto mean_of = [&](float sum) {
        return row_sum<kRowThreads>(sum, scratch) / static_cast<float>(hidden);
    };
    const float mean_gn = mean_of(sum_gn);
    const float mean_g = args.mean != nullptr ? mean_of(sum_g) : 0.0f;

    const auto load_all = [&](int64_t i, auto width) {
        GradVectors<T, width()> vectors;
        vectors.dy = load_vector<width()>(dy_row + i);
        vectors.x = load_vector<width()>(x_row + i);
        vectors.dx = load_vector<width()>(to + i);
        return vectors;
    };
    for_each_vector<kRowThreads, kElements<T>>(lane, hidden, args.vectorised, load_all,
                                               [&](int64_t i, auto width, auto vectors) {
        auto& [dys, xs, dxs] = vectors;
        const auto weights = args.weight.load<width()>(i);
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < width(); ++e) {
            const float g = float(dys[e]) * weights[e];
            const float normal = (float(xs[e]) - center) * rstd;
            dxs[e] = T(float(dxs[e]) + rstd * (g - mean_g - normal * mean_gn));
        }
        store_vector<width()>(to + i, dxs);
    });
}

/// dweight = sum over rows of dy * normal, dbias = sum of dy. One block owns kGradColumns columns
/// and adds its rows in a fixed order, so the result is the same at every run.
template <typename T>
__global__ void __launch_bounds__(kGradColumns * kGradRows)
norm_weight_grad_kernel(const T* __restrict__ dy, const T* __restrict__ x_rows,
                        NormBackwardArguments args, float* __restrict__ dweight,
                        float* __restrict__ dbias) {
    __shared__ float parts[2][kGradRows][kGradColumns];
    const int column_idx = threadIdx.x % kGradColumns, part = threadIdx.x / kGradColumns;
    const int64_t column = int64_t{blockIdx.x} * kGradColumns + column_idx;

    float sum_weight = 0, sum_bias = 0;
    if (column < args.hidden) {
        for (int64_t r = part; r < args.num_rows; r += kGradRows) {
            const float center = args.mean != nullptr ? args.mean[r] : 0.0f;
            const float g = float(dy[r * args.hidden + column]);
            sum_weight += g * (float(x_rows[r * args.hidden + column]) - center) * args.rstd[r];
            sum_bias += g;
        }
    }
    parts[0][part][column_idx] = sum_weight;
    parts[1][part][column_idx] = sum_bias;
    __syncthreads();
    if (part != 0 || column >= args.hidden) return;
    for (int p = 1; p < kGradRows; ++p) {
        sum_weight += parts[0][p][column_idx];
        sum_bias += parts[1][p][column_idx];
    }
    if (dweight != nullptr) dweight[column] = sum_weight;
    if (dbias != nullptr) dbias[column] = sum_bias;
}

}  // namespace lemo::cuda::select_norm::portable
