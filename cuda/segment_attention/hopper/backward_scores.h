// Scores and their gradient in the registers of a consumer of the backward kernel: masks, and where
// the gradient goes in shared memory.
#pragma once

#include "segment_attention/hopper/backward_layout.h"
#include "segment_attention/hopper/fragments.h"

namespace lemo::cuda::segment_attention::hopper {

/// Puts `hidden` in the place of scores or probabilities [keys, queries] of keys that a query does
/// not see.
template <typename Traits, typename Scores>
__device__ __forceinline__ void hide_unseen(const BackwardArguments& args,
                                            const BackwardShared<Traits>& shared,
                                            const BackwardStep& step, int warpgroup, float hidden,
                                            Scores& scores) {
    const SequenceTile tile = shared.tile;
    const VisibleKeys visible(args.plan, tile, step.head, args.num_heads);
    const int query = step.m_tile * Traits::kBlockM + thread_column();
    const int key = tile.tile * Traits::kBlockN + warpgroup * 64 + thread_row();
    CUTE_UNROLL
    for (int e = 0; e < kRowElements<Traits::kBlockM>; ++e) {
        const int2 seen = visible(query + element_column(e));
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
            if (key + 8 * r < seen.x || key + 8 * r >= seen.y) {
                scores(element_index(r, e)) = hidden;
            }
        }
    }
}

/// Where a thread's part of the gradient of the scores lies, which is stored as [queries, keys]:
/// its row of the matrices of 16 queries that store_matrices_transposed writes at a time.
template <typename Traits>
struct DscoresPlace {
    int offset;

    __device__ explicit DscoresPlace(int warpgroup) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int warp = static_cast<int>(threadIdx.x) % kWarpgroupThreads / 32;
        const int query = lane / 16 * 8 + lane % 8;
        const int piece = (warp * 2 + lane / 8 % 2) ^ (query % 8);
        // A warpgroup's keys are one column of swizzled rows of 128 bytes.
        offset = warpgroup * 64 * Traits::kBlockM + query * 64 + piece * 8;
    }

    __device__ __forceinline__ auto* of(typename Traits::Element* dscores, int step) const {
        return dscores + offset + step * 16 * 64;
    }
};

/// What a thread's queries have in shared memory, two of every eight: log-sum-exp or delta.
template <typename Traits>
using QueryStatistics = float2[Traits::kBlockM / 8];

/// The statistics of the columns of accumulators `i` and `i + 1`.
__device__ __forceinline__ float2 statistics_of(const float* from, int i) {
    return *reinterpret_cast<const float2*>(from + thread_column() + 8 * (i / 4));
}

template <typename Traits>
__device__ __forceinline__ void load_statistics(QueryStatistics<Traits>& to, const float* from) {
    CUTE_UNROLL
    for (int i = 0; i < Traits::kBlockM / 8; ++i) {
        to[i] = statistics_of(from, 4 * i);
    }
}

}  // namespace lemo::cuda::segment_attention::hopper
