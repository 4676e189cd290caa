// The forward kernel, Hopper tier: which warps do what.
//
// One thread block stays on each multiprocessor and works on one tile of queries after another. A
// producer warp copies queries, keys and values; each consumer warpgroup has 64 of the queries. A
// consumer starts the scores of the next tile of keys and then the mma of the last one's
// probabilities with their values, and computes the softmax of the one while the other runs. The
// scheduler barrier orders the warpgroups' mmas, so that the softmax of one overlaps with the mmas
// of the others.
#pragma once

#include "segment_attention/hopper/forward_consumer.h"
#include "segment_attention/hopper/forward_producer.h"

namespace lemo::cuda::segment_attention::hopper {

template <typename Traits>
__global__ void
__launch_bounds__(Traits::kThreads, 1)
hopper_forward_kernel(const __grid_constant__ ForwardArguments args) {
    extern __shared__ __align__(1024) std::byte shared_bytes[];
    auto& shared = *reinterpret_cast<ForwardShared<Traits>*>(shared_bytes);
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x) / kWarpgroupThreads);
    if (warpgroup == 0) {
        cutlass::arch::warpgroup_reg_dealloc<Traits::Registers::kProducer>();
        if (threadIdx.x == 0) produce_forward<Traits>(args, shared);
    } else {
        cutlass::arch::warpgroup_reg_alloc<Traits::Registers::kConsumer>();
        consume_forward<Traits>(args, shared, warpgroup - 1);
    }
}

}  // namespace lemo::cuda::segment_attention::hopper
