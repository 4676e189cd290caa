// The warp of the backward kernel that adds each step's part of dq to scratch.
#pragma once

#include "segment_attention/hopper/backward_work.h"

namespace lemo::cuda::segment_attention::hopper {

/// Adds the consumers' parts of dq to scratch; run by one warp, since only whole warps wait at
/// named barriers. Its first lane does the work.
template <typename Traits>
__device__ void add_dq(const BackwardArguments& args, BackwardShared<Traits>& shared,
                       const BackwardWork<Traits>& work) {
    constexpr int kPart = Traits::kDqPart;
    constexpr int kPartBytes = kPart * static_cast<int>(sizeof(float));
    const bool adds = threadIdx.x % 32 == 0;
    for (QueryStep step = work.walk.first(); !work.walk.done(step); work.walk.advance(step)) {
        const int64_t tile_index = args.tile_index(step.head, work.q_tiles_before + step.m_tile);
        int* added_tiles = nullptr;
        if (args.added_tiles != nullptr && adds) {
            const int before = work.tiles_before(args, step);
            added_tiles = args.added_tiles + tile_index;
            int added;
            do {
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                             : "=r"(added)
                             : "l"(added_tiles)
                             : "memory");
            } while (added < before);
        }
        float* to = args.dq_sums + tile_index * Traits::kConsumers * kPart;
        CUTE_UNROLL
        for (int warpgroup = 0; warpgroup < Traits::kConsumers; ++warpgroup) {
            __syncwarp();
            sync_named(Traits::kFirstDqBarrier + warpgroup, Traits::kDqThreads);
            if (adds) {
                publish_shared_writes();  // on behalf of the writers, who would wait for it longer
                add_floats(to + warpgroup * kPart, shared.dq[warpgroup], kPartBytes);
                commit_adds();
            }
        }
        if (adds) {
            wait_adds_read<1>();
            shared.dq_empty[0].arrive();
            wait_adds_read<0>();
            shared.dq_empty[1].arrive();
        }
        if (added_tiles != nullptr) {
            wait_adds<0>();
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
            atomicAdd(added_tiles, 1);
        }
    }
    if (adds) wait_adds<0>();
}

}  // namespace lemo::cuda::segment_attention::hopper
