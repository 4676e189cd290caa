// The epilogue of the backward kernel: a consumer warpgroup stores its rows of dk and dv.
#pragma once

#include "segment_attention/hopper/backward_layout.h"
#include "segment_attention/hopper/epilogue.h"

namespace lemo::cuda::segment_attention::hopper {

/// Scales dk, and stores both. They pass through the places of K and V in shared memory.
template <typename Traits, typename Accumulators>
__device__ __forceinline__ void store_key_gradients(const BackwardArguments& args,
                                                    BackwardShared<Traits>& shared,
                                                    Accumulators& dk, const Accumulators& dv) {
    using Element = typename Traits::Element;
    constexpr int kHeadDim = Traits::kHeadDim;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(dk); ++i) dk(i) *= args.score.scale;
    sync_named(Traits::kKeysBarrier, Traits::kKeysThreads);  // all consumers are done with K and V
    const SequenceTile tile = shared.tile;
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;
    const int warp_row = thread / 32 * 16;
    const int row = tile.tile * Traits::kBlockN + warp_row;
    const auto rows_out = [&](void* base, int columns) {
        const int64_t stride = int64_t{args.num_kv_heads} * columns;
        const int64_t offset = (tile.k_first + row) * stride + int64_t{shared.kv_head} * columns;
        return RowsOut<Element>{static_cast<Element*>(base) + offset, stride, tile.num_k - row,
                                columns};
    };
    store_rows<kHeadDim>(dk, shared.k + warp_row * kHeadDim, rows_out(args.dk, args.head_dim));
    store_rows<kHeadDim>(dv, shared.v + warp_row * kHeadDim, rows_out(args.dv, args.value_dim));
}

}  // namespace lemo::cuda::segment_attention::hopper
