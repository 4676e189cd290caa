// The main backward kernel, Hopper tier: which warps do what.
//
// A thread block has a tile of keys of one key/value head and walks over the query tiles that see
// them, in every query head of the group: dk and dv are accumulators of two consumer warpgroups, 64
// keys each. A producer warp copies queries and output gradients; another warp adds each step's
// part of dq to scratch, in a fixed order of the thread blocks if asked to be deterministic.
//
// The scheduler barrier orders the mmas of the consumers, so that what one computes between them
// overlaps with the mmas of the other. What a step adds to dq needs the keys of both consumers: it
// is computed a step later, when the other one is done with the step, and stored during the mmas of
// dv and dk.
//
// The scheduler barrier orders the gradients of scores as well. What a warpgroup wrote before it
// passes the barrier in one step, both read behind the barrier of the next step; and a warpgroup
// that passes it knows that both are done with what was written two steps before. With three
// buffers nobody has to wait for anything else.
//
// Heads above 128 have consumers with a role each instead, which add dq themselves, see
// backward_roles.h.
//
// Every lane that loads or stores arrives for itself (see Barrier). Three times a step at barriers
// in memory, in the midst of a warpgroup's own work, made head size 64 1.45 times as slow. So it is
// once, during mmas; elsewhere it is at named barriers, which take a warp at once. Roles do without
// those, whose arrivals racecheck does not follow: their steps take longer.
#pragma once

#include "segment_attention/hopper/backward_consumer.h"
#include "segment_attention/hopper/backward_dq.h"
#include "segment_attention/hopper/backward_producer.h"
#include "segment_attention/hopper/backward_roles.h"

namespace lemo::cuda::segment_attention::hopper {

/// Grid: key/value heads times key tiles.
template <typename Traits>
__global__ void
__launch_bounds__(Traits::kThreads, 1)
hopper_backward_kernel(const __grid_constant__ BackwardArguments args) {
    extern __shared__ __align__(1024) std::byte shared_bytes[];
    auto& shared = *reinterpret_cast<BackwardShared<Traits>*>(shared_bytes);
    const int2 place = head_and_tile(args);
    SequenceTile tile;
    if (!find_tile(args.plan, args.plan.cu_k_tiles, args.plan.cu_k, Traits::kBlockN, place.y,
                   tile)) {
        return;
    }
    if (threadIdx.x == 0) {
        shared.init_barriers();
        shared.kv_head = place.x;
        shared.tile = tile;
    }
    __syncthreads();
    const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x) / kWarpgroupThreads);
    if (warpgroup == 0) {
        cutlass::arch::warpgroup_reg_dealloc<Traits::Registers::kProducer>();
        if (threadIdx.x == 0) {
            produce_backward(args, shared, BackwardWork<Traits>(args, shared.tile, shared.kv_head));
        } else if (!Traits::kSplitRoles && threadIdx.x / 32 == 1) {
            add_dq(args, shared, BackwardWork<Traits>(args, shared.tile, shared.kv_head));
        }
    } else {
        cutlass::arch::warpgroup_reg_alloc<Traits::Registers::kConsumer>();
        if constexpr (!Traits::kSplitRoles) {
            consume_backward(args, shared, warpgroup - 1);
        } else if (warpgroup - 1 == kProbabilityRole) {
            consume_probabilities(args, shared);
        } else {
            consume_gradients(args, shared);
        }
    }
}

}  // namespace lemo::cuda::segment_attention::hopper
