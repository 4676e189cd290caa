// The epilogue of the backward kernel: a consumer warpgroup stores its rows of dk and dv.
#pragma once

#include "segment_attention/hopper/backward_layout.h"
#include "segment_attention/hopper/epilogue.h"

namespace lemo::cuda::segment_attention::hopper {

/// Stores a warpgroup's rows of dk or dv, [keys, columns] of a head. They pass through `area`, the
/// place of K or V in shared memory [kBlockN, kColumns], with which all consumers are done.
template <typename Traits, int kColumns, typename Accumulators>
__device__ __forceinline__ void store_gradient(const BackwardArguments& args,
                                               BackwardShared<Traits>& shared,
                                               const Accumulators& gradient,
                                               typename Traits::Element* area, void* base,
                                               int columns) {
    using Element = typename Traits::Element;
    const SequenceTile tile = shared.tile;
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;
    // With roles both warpgroups have the same rows, each of another gradient.
    const int warp_row = thread / 32 * 16 % Traits::kBlockN;
    const int row = tile.tile * Traits::kBlockN + warp_row;
    const int64_t stride = int64_t{args.num_kv_heads} * columns;
    const int64_t offset = (tile.k_first + row) * stride + int64_t{shared.kv_head} * columns;
    store_rows<kColumns>(
        gradient, area + warp_row * kColumns,
        RowsOut<Element>{static_cast<Element*>(base) + offset, stride, tile.num_k - row, columns});
}

template <typename Accumulators>
__device__ __forceinline__ void scale_gradient(Accumulators& gradient, float scale) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(gradient); ++i) gradient(i) *= scale;
}

/// Scales dk, and stores both, where a consumer has both of its keys.
template <typename Traits, typename KeyGradient, typename ValueGradient>
__device__ __forceinline__ void store_key_gradients(const BackwardArguments& args,
                                                    BackwardShared<Traits>& shared, KeyGradient& dk,
                                                    const ValueGradient& dv) {
    scale_gradient(dk, args.score.scale);
    sync_named(Traits::kKeysBarrier, Traits::kKeysThreads);  // all consumers are done with K and V
    store_gradient<Traits, Traits::kHeadDim>(args, shared, dk, shared.k, args.dk, args.head_dim);
    store_gradient<Traits, Traits::kValueDim>(args, shared, dv, shared.v, args.dv, args.value_dim);
}

}  // namespace lemo::cuda::segment_attention::hopper
