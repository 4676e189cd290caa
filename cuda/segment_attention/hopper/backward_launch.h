// Host side of the backward pass, Hopper tier: statistics of the queries, the main kernel,
// rounding.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "segment_attention/hopper/backward_kernel.h"
#include "segment_attention/hopper/backward_rows.h"
#include "segment_attention/hopper/kernels.h"

namespace lemo::cuda::segment_attention::hopper {

template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
int64_t BackwardPass<Element, kHeadDim, kValueDim, kCapped>::scratch_bytes(
    const SegmentAttentionBackwardParams& params) {
    return count_scratch_bytes<
        BackwardScratch<BackwardTraits<Element, kHeadDim, kValueDim, kCapped>>>(params);
}

template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
void BackwardPass<Element, kHeadDim, kValueDim, kCapped>::launch(
    const SegmentAttentionBackwardParams& params, cudaStream_t stream) {
    using Traits = BackwardTraits<Element, kHeadDim, kValueDim, kCapped>;
    constexpr const char* kOp = "segment_attention_backward";
    const SegmentAttentionParams& p = params.forward;
    Arena arena(params.scratch);
    const BackwardScratch<Traits> scratch(params, arena);
    BackwardArguments args{};
    args.q = make_tensor_map(kOp, p.q, Traits::kBlockM);
    args.k = make_tensor_map(kOp, p.k, Traits::kBlockN);
    args.v = make_tensor_map(kOp, p.v, Traits::kBlockN);
    args.dout = make_tensor_map(kOp, params.dout, Traits::kBlockM);
    args.out = p.out.data;
    args.dout_rows = params.dout.data;
    args.lse = p.lse.as<const float>();
    args.dq = params.dq.data;
    args.dk = params.dk.data;
    args.dv = params.dv.data;
    args.plan = make_plan(p, Traits::kBlockM, Traits::kBlockN, scratch.plan, stream);
    args.tile_lse = scratch.tile_lse;
    args.tile_delta = scratch.tile_delta;
    args.dq_sums = scratch.dq_sums;
    args.added_tiles = params.deterministic ? scratch.added_tiles : nullptr;
    args.num_heads = static_cast<int>(p.q.size(1));
    args.num_kv_heads = static_cast<int>(p.k.size(1));
    args.head_dim = static_cast<int>(p.q.size(2));
    args.value_dim = static_cast<int>(p.v.size(2));
    args.score = ScoreSettings(p);
    args.sink_terms = scratch.sink_terms;

    const dim3 query_grid(grid_x(kOp, "q", args.plan.max_q_tiles),
                          grid_yz(kOp, "q", args.num_heads));
    hopper_statistics_kernel<Traits><<<query_grid, kRowKernelThreads, 0, stream>>>(args);
    check_launch(kOp);
    sum_sink_terms(params, args.sink_terms, stream);
    auto* kernel = hopper_backward_kernel<Traits>;
    constexpr int kSharedBytes = static_cast<int>(sizeof(BackwardShared<Traits>));
    static_assert(kSharedBytes <= kMaxSharedBytes, "all buffers fit into shared memory");
    reserve_shared_memory(kOp, kernel, kSharedBytes);
    // As few as occupy the GPU: the queries and the sums of dq of a head then stay in the L2 cache.
    const int multiprocessors = num_multiprocessors(kOp);
    args.heads_at_once = std::clamp(
        (multiprocessors + args.plan.max_k_tiles / 2) / std::max(args.plan.max_k_tiles, 1), 1,
        args.num_kv_heads);
    const unsigned blocks = grid_x(kOp, "k", int64_t{args.num_kv_heads} * args.plan.max_k_tiles);
    kernel<<<blocks, Traits::kThreads, kSharedBytes, stream>>>(args);
    check_launch(kOp);
    hopper_dq_kernel<Traits><<<query_grid, kRowKernelThreads, 0, stream>>>(args);
    check_launch(kOp);
}

}  // namespace lemo::cuda::segment_attention::hopper
