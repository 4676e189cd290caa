// The producer of the backward kernel: copies keys, values, queries and output gradients into
// shared memory.
#pragma once

#include "segment_attention/hopper/backward_work.h"
#include "segment_attention/hopper/copy_tile.h"

namespace lemo::cuda::segment_attention::hopper {

/// Copies everything that the consumers read; run by one thread.
template <typename Traits>
__device__ void produce_backward(const BackwardArguments& args, BackwardShared<Traits>& shared,
                                 const BackwardWork<Traits>& work) {
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim, kValueDim = Traits::kValueDim;
    constexpr int kRowBytes = kBlockM * static_cast<int>(sizeof(float));

    QueryStep step = work.walk.first();
    if (!work.walk.done(step)) {
        const int key_row = work.tile.k_first + work.tile.tile * kBlockN;
        shared.kv_full.arrive_expecting(kTileBytes<kBlockN, kHeadDim, Element> +
                                        kTileBytes<kBlockN, kValueDim, Element>);
        copy_tile<kBlockN, kHeadDim>(args.k, shared.kv_full, shared.k, work.kv_head, key_row);
        copy_tile<kBlockN, kValueDim>(args.v, shared.kv_full, shared.v, work.kv_head, key_row);
    }
    RingPosition<Traits::kStages> at;
    for (; !work.walk.done(step); work.walk.advance(step)) {
        const int row = work.tile.q_first + step.m_tile * kBlockM;
        const int64_t first =
            args.tile_index(step.head, work.q_tiles_before + step.m_tile) * kBlockM;
        BackwardStep shown{step.head, step.m_tile, work.needs_mask(args, step)};
        if constexpr (Traits::kSplitRoles) {
            shown.packed_tile = work.q_tiles_before + step.m_tile;
            if (args.added_tiles != nullptr) shown.tiles_before = work.tiles_before(args, step);
        }
        shared.step_empty[at.stage].wait(at.parity ^ 1);
        shared.steps[at.stage] = shown;
        Barrier& q_full = shared.q_full[at.stage];
        q_full.arrive_expecting(kTileBytes<kBlockM, kHeadDim, Element> + kRowBytes);
        copy_tile<kBlockM, kHeadDim>(args.q, q_full, shared.q[at.stage], step.head, row);
        copy_bytes(args.tile_lse + first, q_full, shared.lse[at.stage], kRowBytes);

        Barrier& dout_full = shared.dout_full[at.stage];
        dout_full.arrive_expecting(kTileBytes<kBlockM, kValueDim, Element> + kRowBytes);
        copy_tile<kBlockM, kValueDim>(args.dout, dout_full, shared.dout[at.stage], step.head, row);
        copy_bytes(args.tile_delta + first, dout_full, shared.delta[at.stage], kRowBytes);
        at.advance();
    }
    shared.step_empty[at.stage].wait(at.parity ^ 1);
    shared.steps[at.stage].m_tile = -1;
    shared.q_full[at.stage].arrive();
    // Roles wait for it before they know that nothing comes any more.
    if constexpr (Traits::kSplitRoles) shared.dout_full[at.stage].arrive();
}

}  // namespace lemo::cuda::segment_attention::hopper
