// Turns of warpgroups.
#pragma once

#include "common/hopper.h"

namespace lemo::cuda::hopper {

/// Named barriers: the turns of the consumer warpgroups, one for each, from this number on.
inline constexpr int kFirstTurnBarrier = 1;

/// The turns of the consumer warpgroups to start products, one after the other and round again: so
/// what one computes falls beneath the products of the others.
template <int kConsumers>
struct Turns {
    static constexpr int kThreads = 2 * kWarpgroupThreads;  // who waits, and who passes on
    int warpgroup;

    __device__ explicit Turns(int warpgroup) : warpgroup(warpgroup) {
        if (warpgroup == kConsumers - 1) arrive_named(kFirstTurnBarrier, kThreads);
    }
    __device__ __forceinline__ void wait() const {
        sync_named(kFirstTurnBarrier + warpgroup, kThreads);
    }
    __device__ __forceinline__ void pass_on() const {
        const int next = warpgroup == kConsumers - 1 ? 0 : warpgroup + 1;
        arrive_named(kFirstTurnBarrier + next, kThreads);
    }
    /// Takes up the last turn that was passed on.
    __device__ void finish() const {
        if (warpgroup == 0) wait();
    }
};

}  // namespace lemo::cuda::hopper
