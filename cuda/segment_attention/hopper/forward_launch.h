// Host side of the forward pass, Hopper tier.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "segment_attention/hopper/forward_kernel.h"
#include "segment_attention/hopper/kernels.h"

namespace lemo::cuda::segment_attention::hopper {

/// Key/value heads of a section of the work, of which `head_tiles` tiles of queries read each: as
/// many as the L2 cache holds beside queries and results, and enough for several tiles on each
/// multiprocessor. Sections of one size, since a small last one would leave multiprocessors idle.
inline int section_heads(const Tensor& k, const Tensor& v, int head_tiles, int multiprocessors) {
    constexpr int64_t kCachedBytes = int64_t{16} << 20;
    constexpr int kTiles = 4;
    constexpr int64_t kElementBytes = 2;
    const int64_t heads = k.size(1);
    const int64_t head_bytes = k.size(0) * (k.size(2) + v.size(2)) * kElementBytes;
    const int64_t most = std::max<int64_t>({kCachedBytes / std::max<int64_t>(head_bytes, 1),
                                            ceil_div(kTiles * multiprocessors, head_tiles), 1});
    const int64_t sections = ceil_div(heads, std::min(most, heads));
    return static_cast<int>(ceil_div(heads, sections));
}

template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
int64_t ForwardPass<Element, kHeadDim, kValueDim, kCapped>::scratch_bytes(
    const SegmentAttentionParams& params) {
    return count_scratch_bytes<ForwardScratch>(params);
}

template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
void ForwardPass<Element, kHeadDim, kValueDim, kCapped>::launch(
    const SegmentAttentionParams& params, cudaStream_t stream) {
    using Traits = ForwardTraits<Element, kHeadDim, kValueDim, kCapped>;
    constexpr const char* kOp = "segment_attention";
    Arena arena(params.scratch);
    const ForwardScratch scratch(params, arena);
    ForwardArguments args{};
    args.q = make_tensor_map(kOp, params.q, Traits::kBlockM);
    args.k = make_tensor_map(kOp, params.k, Traits::kBlockN);
    args.v = make_tensor_map(kOp, params.v, Traits::kBlockN);
    args.out = params.out.data;
    args.lse = params.lse.as<float>();
    args.next_work = scratch.next_work;
    args.plan = make_plan(params, Traits::kBlockM, Traits::kBlockN, scratch.plan, stream);
    args.num_heads = static_cast<int>(params.q.size(1));
    args.num_kv_heads = static_cast<int>(params.k.size(1));
    args.value_dim = static_cast<int>(params.v.size(2));
    args.score = ScoreSettings(params);
    check_status(kOp, cudaMemsetAsync(args.next_work, 0, sizeof(int), stream));

    auto* kernel = hopper_forward_kernel<Traits>;
    constexpr int kSharedBytes = static_cast<int>(sizeof(ForwardShared<Traits>));
    static_assert(kSharedBytes <= kMaxSharedBytes, "all buffers fit into shared memory");
    reserve_shared_memory(kOp, kernel, kSharedBytes);
    const int multiprocessors = num_multiprocessors(kOp);
    const int64_t items = grid_x(kOp, "q", int64_t{args.num_heads} * args.plan.max_q_tiles);
    const int group = args.num_heads / args.num_kv_heads;
    args.heads_at_once =
        group * section_heads(params.k, params.v, group * args.plan.max_q_tiles, multiprocessors);
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(items, multiprocessors));
    kernel<<<blocks, Traits::kThreads, kSharedBytes, stream>>>(args);
    check_launch(kOp);
}

}  // namespace lemo::cuda::segment_attention::hopper
