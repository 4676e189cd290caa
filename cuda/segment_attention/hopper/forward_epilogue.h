// The epilogue of the forward kernel: a consumer warpgroup stores the output and lse of its rows.
#pragma once

#include "segment_attention/hopper/epilogue.h"
#include "segment_attention/hopper/forward_softmax.h"
#include "segment_attention/row_end.h"

namespace lemo::cuda::segment_attention::hopper {

template <typename Traits, typename Accumulators>
__device__ __forceinline__ void store_output(const ForwardArguments& args,
                                             ForwardShared<Traits>& shared, const ForwardWork& work,
                                             int warpgroup, const ForwardSoftmax& softmax,
                                             Accumulators& output) {
    using Element = typename Traits::Element;
    constexpr int kValueDim = Traits::kValueDim;
    const auto end_of = [&](int r) {
        return RowEnd(softmax.max[r] * args.score.softmax_scale, softmax.sum[r], args.score.sinks,
                      work.head);
    };
    const RowEnd ends[] = {end_of(0), end_of(1)};
    scale_rows<kValueDim>(output, make_float2(ends[0].factor, ends[1].factor));
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
        const int row = work.m_first + warpgroup * 64 + thread_row() + 8 * r;
        if (threadIdx.x % 4 == 0 && row < work.tile.num_q) {
            args.lse[int64_t{work.head} * args.plan.num_queries + work.tile.q_first + row] =
                ends[r].log_sum;
        }
    }
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;
    const int warp_row = warpgroup * 64 + thread % kWarpgroupThreads / 32 * 16;
    const int64_t row = work.tile.q_first + work.m_first + warp_row;
    const int64_t stride = int64_t{args.num_heads} * args.value_dim;
    const RowsOut<Element> rows{
        static_cast<Element*>(args.out) + row * stride + int64_t{work.head} * args.value_dim,
        stride, work.tile.num_q - work.m_first - warp_row, args.value_dim};
    if constexpr (!Traits::kOutputInQ) {
        store_rows<kValueDim>(output, shared.out + warp_row * kValueDim, rows);
    } else if (work.n_begin < work.n_end) {
        // The mmas of all warps of the warpgroup have read its queries.
        sync_named(Traits::kFirstOutputBarrier + warpgroup, kWarpgroupThreads);
        store_rows<kValueDim, Traits::kBlockM>(output, shared.q + warp_row * 64, rows);
        publish_shared_writes();  // before the copies that overwrite them
        shared.q_empty.arrive();
    } else {
        store_zeros<kValueDim>(rows);  // the place may already hold the queries of other work
    }
}

}  // namespace lemo::cuda::segment_attention::hopper
