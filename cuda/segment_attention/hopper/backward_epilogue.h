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
    for (int i = 0; i < cute::size(dk); ++i) dk(i) *= args.scale;
    sync_named(Traits::kKeysBarrier, Traits::kKeysThreads);  // all consumers are done with K and V
    const SequenceTile tile = shared.tile;
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;
    const int warp_row = thread / 32 * 16;
    const int row = tile.tile * Traits::kBlockN + warp_row;
    const int64_t stride = int64_t{args.num_kv_heads} * args.head_dim;
    const int64_t offset = (tile.k_first + row) * stride + int64_t{shared.kv_head} * args.head_dim;
    const auto rows_out = [&](void* base) {
        return RowsOut<Element>{static_cast<Element*>(base) + offset, stride, tile.num_k - row,
                                args.head_dim};
    };
    store_rows<kHeadDim>(dk, shared.k + warp_row * kHeadDim, rows_out(args.dk));
    store_rows<kHeadDim>(dv, shared.v + warp_row * kHeadDim, rows_out(args.dv));
}

}  // namespace lemo::cuda::segment_attention::hopper
