// The scheduler barrier: in which order warpgroups start their mmas.
#pragma once

#include "common/hopper.h"

namespace lemo::cuda::segment_attention::hopper {

/// Consumer warpgroups start mmas one after the other and round again, so that what one computes in
/// between overlaps with the mmas of the others. One named barrier for each warpgroup, from number
/// kFirstBarrier on: there it waits, and the warpgroup before it arrives.
template <int kFirstBarrier, int kConsumers>
struct SchedulerBarrier {
    static constexpr int kThreads = 2 * kWarpgroupThreads;  // those that wait and those that arrive
    int warpgroup;

    __device__ explicit SchedulerBarrier(int warpgroup) : warpgroup(warpgroup) {
        // Nobody comes before the first warpgroup when it starts for the first time.
        if (warpgroup == kConsumers - 1) arrive_named(kFirstBarrier, kThreads);
    }
    /// Waits until this warpgroup may start mmas.
    __device__ __forceinline__ void wait() const {
        sync_named(kFirstBarrier + warpgroup, kThreads);
    }
    /// Lets the next warpgroup start.
    __device__ __forceinline__ void let_next() const {
        const int next = warpgroup == kConsumers - 1 ? 0 : warpgroup + 1;
        arrive_named(kFirstBarrier + next, kThreads);
    }
    /// Waits for the last arrival, which would otherwise stay behind at the barrier.
    __device__ void finish() const {
        if (warpgroup == 0) wait();
    }
};

}  // namespace lemo::cuda::segment_attention::hopper
