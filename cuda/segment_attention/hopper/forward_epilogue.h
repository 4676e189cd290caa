// The epilogue of the forward kernel: a consumer warpgroup stores the output and lse of its rows.
#pragma once

#include "segment_attention/hopper/epilogue.h"
#include "segment_attention/hopper/forward_softmax.h"

namespace lemo::cuda::segment_attention::hopper {

template <typename Traits, typename Accumulators>
__device__ __forceinline__ void store_output(const ForwardArguments& args,
                                             ForwardShared<Traits>& shared, const ForwardWork& work,
                                             int warpgroup, const ForwardSoftmax& softmax,
                                             Accumulators& output) {
    using Element = typename Traits::Element;
    constexpr int kHeadDim = Traits::kHeadDim;
    // Rows that see no key.
    const bool blind[] = {softmax.sum[0] == 0.0f, softmax.sum[1] == 0.0f};
    scale_rows<kHeadDim>(output, make_float2(blind[0] ? 0.0f : 1.0f / softmax.sum[0],
                                             blind[1] ? 0.0f : 1.0f / softmax.sum[1]));
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
        const int row = work.m_first + warpgroup * 64 + thread_row() + 8 * r;
        if (threadIdx.x % 4 == 0 && row < work.tile.num_q) {
            args.lse[int64_t{work.head} * args.plan.num_queries + work.tile.q_first + row] =
                blind[r] ? -INFINITY : softmax.max[r] * fabsf(args.scale) + logf(softmax.sum[r]);
        }
    }
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;
    const int warp_row = warpgroup * 64 + thread % kWarpgroupThreads / 32 * 16;
    const int64_t row = work.tile.q_first + work.m_first + warp_row;
    const int64_t stride = int64_t{args.num_heads} * args.head_dim;
    store_rows<kHeadDim, Element>(
        output, shared.out + warp_row * kHeadDim,
        {static_cast<Element*>(args.out) + row * stride + int64_t{work.head} * args.head_dim,
         stride, work.tile.num_q - work.m_first - warp_row, args.head_dim});
}

}  // namespace lemo::cuda::segment_attention::hopper
