// The producer of the forward kernel: copies queries, keys and values into shared memory.
#pragma once

#include "segment_attention/hopper/copy_tile.h"
#include "segment_attention/hopper/forward_work.h"

namespace lemo::cuda::segment_attention::hopper {

/// Run by one thread, while there is work.
template <typename Traits>
__device__ void produce_forward(const ForwardArguments& args, ForwardShared<Traits>& shared) {
    using Element = typename Traits::Element;
    constexpr int kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim, kValueDim = Traits::kValueDim;
    WorkQueue<Traits> queue(args, shared);
    RingPosition<1> q_at;
    RingPosition<Traits::kStages> k_at, v_at;
    ForwardWork work;
    while (queue.next(work)) {
        if (work.n_begin >= work.n_end) continue;
        const auto copy_keys = [&](int n_tile) {
            shared.k_empty[k_at.stage].wait(k_at.parity ^ 1);
            Barrier& full = shared.k_full[k_at.stage];
            full.arrive_expecting(kTileBytes<kBlockN, kHeadDim, Element>);
            copy_tile<kBlockN, kHeadDim>(args.k, full, shared.k[k_at.stage], work.kv_head,
                                         work.tile.k_first + n_tile * kBlockN);
            k_at.advance();
        };
        const auto copy_values = [&](int n_tile) {
            shared.v_empty[v_at.stage].wait(v_at.parity ^ 1);
            Barrier& full = shared.v_full[v_at.stage];
            full.arrive_expecting(kTileBytes<kBlockN, kValueDim, Element>);
            copy_tile<kBlockN, kValueDim>(args.v, full, shared.v[v_at.stage], work.kv_head,
                                          work.tile.k_first + n_tile * kBlockN);
            v_at.advance();
        };
        // Queries that wait for the output before them do not hold up the first keys.
        if constexpr (Traits::kOutputInQ) copy_keys(work.n_end - 1);
        shared.q_empty.wait(q_at.parity ^ 1);
        shared.q_full.arrive_expecting(kTileBytes<Traits::kBlockM, kHeadDim, Element>);
        copy_tile<Traits::kBlockM, kHeadDim>(args.q, shared.q_full, shared.q, work.head,
                                             work.tile.q_first + work.m_first);
        q_at.advance();
        if constexpr (!Traits::kOutputInQ) copy_keys(work.n_end - 1);
        for (int n_tile = work.n_end - 1; n_tile >= work.n_begin; --n_tile) {
            if (n_tile > work.n_begin) copy_keys(n_tile - 1);
            copy_values(n_tile);
        }
    }
}

}  // namespace lemo::cuda::segment_attention::hopper
