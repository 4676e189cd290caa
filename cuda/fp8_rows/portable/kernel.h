// The kernels of fp8_rows: one thread block for each row, which its threads hold in registers
// between the largest magnitude and the store, so device memory is read once.
#pragma once

#include <cuda_runtime.h>

#include "common/fp8.h"
#include "common/vector.h"

namespace lemo::cuda::fp8_rows::portable {

constexpr int kThreads = 256;
// Vectors of a row that a thread holds at most; 16 KiB of bf16 columns then fit a block.
constexpr int kMostVectors = 8;
// One access is 16 bytes of the row's type.
template <typename T>
constexpr int kElements = 16 / static_cast<int>(sizeof(T));

/// Rows of at most kThreads * kVectors vectors, at addresses for 16-byte accesses. With factors of
/// columns (kScaled) products are held, so that factors are read once.
template <typename T, int kVectors, bool kScaled>
__global__ void
__launch_bounds__(kThreads)
held_rows_kernel(const T* __restrict__ x, const float* __restrict__ columns,
                 uint8_t* __restrict__ values, float* __restrict__ scales, int64_t num_columns) {
    constexpr int n = kElements<T>;
    __shared__ float scratch[kReduceScratch];
    const int64_t row = blockIdx.x;
    const T* from = x + row * num_columns;

    cutlass::AlignedArray<T, n> loaded[kVectors];
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        const int64_t i = (int64_t{v} * kThreads + threadIdx.x) * n;
        if (i < num_columns) loaded[v] = load_vector<n>(from + i);
    }
    float products[kScaled ? kVectors : 1][n];
    float largest = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        const int64_t i = (int64_t{v} * kThreads + threadIdx.x) * n;
        if (i >= num_columns) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int first = 0; first < n; first += 4) {
            cutlass::AlignedArray<float, 4> factors;
            if constexpr (kScaled) factors = load_vector<4>(columns + i + first);
            CUTLASS_PRAGMA_UNROLL
            for (int e = 0; e < 4; ++e) {
                float value = float(loaded[v][first + e]);
                if constexpr (kScaled) products[v][first + e] = value *= factors[e];
                largest = fmaxf(largest, fabsf(value));
            }
        }
    }
    const Fp8Scale found = Fp8Scale::of<kThreads>(largest, scratch);
    if (threadIdx.x == 0) scales[row] = found.scale;
    CUTLASS_PRAGMA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
        const int64_t i = (int64_t{v} * kThreads + threadIdx.x) * n;
        if (i >= num_columns) continue;
        store_e4m3<n>(values + row * num_columns + i, [&](int e) {
            if constexpr (kScaled) return products[v][e] * found.inverse;
            return float(loaded[v][e]) * found.inverse;
        });
    }
}

/// Rows of any length, anywhere: element by element, read twice.
template <typename T>
__global__ void __launch_bounds__(kThreads)
any_rows_kernel(const T* __restrict__ x, const float* __restrict__ columns,
                uint8_t* __restrict__ values, float* __restrict__ scales, int64_t num_columns) {
    __shared__ float scratch[kReduceScratch];
    const int64_t row = blockIdx.x, first = row * num_columns;
    const auto element = [&](int64_t i) {
        const float value = float(x[first + i]);
        return columns == nullptr ? value : value * columns[i];
    };
    float largest = 0;
    for (int64_t i = threadIdx.x; i < num_columns; i += kThreads) {
        largest = fmaxf(largest, fabsf(element(i)));
    }
    const Fp8Scale found = Fp8Scale::of<kThreads>(largest, scratch);
    if (threadIdx.x == 0) scales[row] = found.scale;
    for (int64_t i = threadIdx.x; i < num_columns; i += kThreads) {
        values[first + i] = to_e4m3(element(i) * found.inverse);
    }
}

// A thread block transposes 128 x 128 bytes, through shared memory, in words of four.
constexpr int kTile = 128;
constexpr int kTileWords = kTile / 4;
// One word more, so that the words of a column lie in different banks.
constexpr int kTileStride = kTileWords + 1;
constexpr int kVectorBytes = 16;
constexpr int kVectorWords = kVectorBytes / 4;

/// Four words, byte j of each: word j of their transpose.
__device__ __forceinline__ uint32_t gathered_bytes(const uint32_t (&words)[4], int j) {
    const uint32_t low = __byte_perm(words[0], words[1], j | (4 + j) << 4);
    const uint32_t high = __byte_perm(words[2], words[3], j | (4 + j) << 4);
    return __byte_perm(low, high, 0x5410);
}

/// Grid: tiles of columns, `column_tiles` of them in each row of tiles, and tiles of rows.
__global__ void __launch_bounds__(kThreads)
transpose_kernel(const uint8_t* __restrict__ x, uint8_t* __restrict__ y, int64_t rows,
                 int64_t columns, unsigned column_tiles) {
    __shared__ uint32_t from[kTile][kTileStride], to[kTile][kTileStride];
    const int64_t first_row = int64_t{blockIdx.x / column_tiles} * kTile;
    const int64_t first_column = int64_t{blockIdx.x % column_tiles} * kTile;
    constexpr int kRowVectors = kTile / kVectorBytes, kRowsAtOnce = kThreads / kRowVectors;
    const int vector = static_cast<int>(threadIdx.x) % kRowVectors;
    const int first = static_cast<int>(threadIdx.x) / kRowVectors;

    CUTLASS_PRAGMA_UNROLL
    for (int r = first; r < kTile; r += kRowsAtOnce) {
        const int64_t row = first_row + r, column = first_column + vector * kVectorBytes;
        if (row >= rows || column >= columns) continue;
        const auto bytes = load_vector<kVectorBytes>(x + row * columns + column);
        const auto* words = reinterpret_cast<const uint32_t*>(&bytes);
        CUTLASS_PRAGMA_UNROLL
        for (int w = 0; w < kVectorWords; ++w) from[r][vector * kVectorWords + w] = words[w];
    }
    __syncthreads();

    // A warp takes 8 words of a row and 4 of a column: its stores then fall into 32 banks.
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    CUTLASS_PRAGMA_UNROLL
    for (int part = 0; part < kTileWords * kTileWords / kThreads; ++part) {
        const int block = part * (kThreads / 32) + warp;
        const int word_column = block % (kTileWords / 8) * 8 + lane % 8;
        const int word_row = block / (kTileWords / 8) * 4 + lane / 8;
        uint32_t words[4];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) words[i] = from[4 * word_row + i][word_column];
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j) to[4 * word_column + j][word_row] = gathered_bytes(words, j);
    }
    __syncthreads();

    CUTLASS_PRAGMA_UNROLL
    for (int c = first; c < kTile; c += kRowsAtOnce) {
        const int64_t column = first_column + c, row = first_row + vector * kVectorBytes;
        if (row >= rows || column >= columns) continue;
        cutlass::AlignedArray<uint8_t, kVectorBytes> bytes;
        auto* words = reinterpret_cast<uint32_t*>(&bytes);
        CUTLASS_PRAGMA_UNROLL
        for (int w = 0; w < kVectorWords; ++w) words[w] = to[c][vector * kVectorWords + w];
        store_vector<kVectorBytes>(y + column * rows + row, bytes);
    }
}

}  // namespace lemo::cuda::fp8_rows::portable
