// The two kernels around the main one of the backward pass: what it reads of every query, and dq.
#pragma once

#include <cmath>

#include "segment_attention/hopper/backward_layout.h"
#include "segment_attention/hopper/epilogue.h"
#include "segment_attention/sinks.h"

namespace lemo::cuda::segment_attention::hopper {

inline constexpr int kRowKernelThreads = 256;

/// Statistics of the rows of a query tile, in the order in which the main kernel copies them, and
/// zeros for its sums of dq. Grid: query tiles, heads.
template <typename Traits>
__global__ void
__launch_bounds__(kRowKernelThreads)
hopper_statistics_kernel(const __grid_constant__ BackwardArguments args) {
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kHeadDim = Traits::kHeadDim;
    SequenceTile tile;
    const int packed_tile = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
    if (!find_tile(args.plan, args.plan.cu_q_tiles, args.plan.cu_q, kBlockM, packed_tile, tile)) {
        return;
    }
    const int64_t tile_index = args.tile_index(head, packed_tile);
    constexpr int kSums = kBlockM * kHeadDim;
    auto* sums = reinterpret_cast<float4*>(args.dq_sums + tile_index * kSums);
    CUTE_UNROLL
    for (int i = 0; i < kSums / 4; i += kRowKernelThreads) {
        sums[i + threadIdx.x] = make_float4(0, 0, 0, 0);
    }
    if (args.added_tiles != nullptr && threadIdx.x == 0) args.added_tiles[tile_index] = 0;

    using Vector = cutlass::AlignedArray<Element, 8>;
    constexpr int kLanes = Traits::kValueDim / 8;  // of a row
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    for (int r = static_cast<int>(threadIdx.x) / kLanes; r < kBlockM;
         r += kRowKernelThreads / kLanes) {
        const int row = tile.tile * kBlockM + r;
        const bool exists = row < tile.num_q;
        float sum = 0;
        if (exists && lane * 8 < args.value_dim) {
            const int64_t offset =
                (int64_t{tile.q_first + row} * args.num_heads + head) * args.value_dim + lane * 8;
            const auto out =
                *reinterpret_cast<const Vector*>(static_cast<const Element*>(args.out) + offset);
            const auto dout = *reinterpret_cast<const Vector*>(
                static_cast<const Element*>(args.dout_rows) + offset);
            CUTE_UNROLL
            for (int i = 0; i < 8; ++i) sum = fmaf(float(out[i]), float(dout[i]), sum);
        }
        CUTE_UNROLL
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        if (lane == 0) {
            float lse = INFINITY;  // makes every probability of the row zero
            if (exists) {
                const int64_t at = int64_t{head} * args.plan.num_queries + tile.q_first + row;
                lse = args.lse[at] * float(M_LOG2E);
                if (args.score.sinks != nullptr) {
                    args.sink_terms[at] = sink_term(args.score.sinks[head], lse, sum);
                }
                if (lse == -INFINITY) lse = INFINITY;
            }
            args.tile_lse[tile_index * kBlockM + r] = lse;
            args.tile_delta[tile_index * kBlockM + r] = sum;
        }
    }
}

/// Scales and rounds the sums of dq. Grid: query tiles, heads.
template <typename Traits>
__global__ void __launch_bounds__(kRowKernelThreads)
hopper_dq_kernel(const __grid_constant__ BackwardArguments args) {
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kHeadDim = Traits::kHeadDim;
    constexpr int kGroups = Traits::kDqColumns / 8;  // of columns: queries
    static_assert(kGroups % 2 == 0, "they are stored in pairs");
    static_assert(kRowKernelThreads == Traits::kConsumers * kWarpgroupThreads,
                  "each thread rounds what one consumer thread has added");
    SequenceTile tile;
    const int packed_tile = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
    if (!find_tile(args.plan, args.plan.cu_q_tiles, args.plan.cu_q, kBlockM, packed_tile, tile)) {
        return;
    }
    __shared__ __align__(128) Element shared[kBlockM * kHeadDim];
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    const int lane = thread % 32;
    const auto* sums = reinterpret_cast<const float4*>(
                           args.dq_sums + args.tile_index(head, packed_tile) * kBlockM * kHeadDim +
                           warpgroup * Traits::kDqPart) +
                       thread;
    const auto pack = [&](float a, float b) {
        return round_pair<Element>(a * args.score.scale, b * args.score.scale);
    };
    // The sums are transposed: a thread's rows are columns of dq.
    const int first_query = Traits::kShareHeadDim ? 0 : warpgroup * Traits::kDqColumns;
    CUTE_UNROLL
    for (int row_tile = 0; row_tile < Traits::kDqRowTiles; ++row_tile) {
        const int tile_64 =
            Traits::kShareHeadDim ? row_tile * Traits::kConsumers + warpgroup : row_tile;
        const int piece = tile_64 * 8 + thread / 32 * 2 + lane / 8 % 2;
        CUTE_UNROLL
        for (int g = 0; g < kGroups; g += 2) {
            const float4 a = sums[(row_tile * kGroups + g) * kWarpgroupThreads];
            const float4 b = sums[(row_tile * kGroups + g + 1) * kWarpgroupThreads];
            const int query = first_query + (g + lane / 16) * 8 + lane % 8;
            store_matrices_transposed(staged_piece<kHeadDim>(shared, query, piece), pack(a.x, a.y),
                                      pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
        }
    }
    __syncthreads();
    // Every warp writes a share of the rows.
    constexpr int kRows = kBlockM / (kRowKernelThreads / 32);
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * kRows;
    const int row = tile.tile * kBlockM + warp_row;
    const int64_t stride = int64_t{args.num_heads} * args.head_dim;
    write_staged<kHeadDim, kRows>(
        shared, warp_row,
        RowsOut<Element>{static_cast<Element*>(args.dq) + (tile.q_first + row) * stride +
                             int64_t{head} * args.head_dim,
                         stride, tile.num_q - row, args.head_dim});
}

}  // namespace lemo::cuda::segment_attention::hopper
