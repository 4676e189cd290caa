// Which tile of keys a thread block of the backward kernel works on, and the query tiles it visits.
#pragma once

#include "segment_attention/hopper/backward_layout.h"
#include "segment_attention/query_walk.h"

namespace lemo::cuda::segment_attention::hopper {

/// The key/value head and packed key tile of a thread block. A few heads at a time, so that their
/// queries stay in the L2 cache; tiles from the first, which the most queries see.
__device__ __forceinline__ int2 head_and_tile(const BackwardArguments& args) {
    const int block = static_cast<int>(blockIdx.x);
    const int section_blocks = args.heads_at_once * args.plan.max_k_tiles;
    const int first_head = block / section_blocks * args.heads_at_once;
    const int heads = min(args.heads_at_once, args.num_kv_heads - first_head);
    const int rest = block % section_blocks;
    return make_int2(first_head + rest % heads, rest / heads);
}

/// What a thread block works on, for the warps that copy.
template <typename Traits>
struct BackwardWork {
    int kv_head;
    SequenceTile tile;
    int q_tiles_before;
    QueryWalk walk;

    __device__ BackwardWork(const BackwardArguments& args, const SequenceTile& tile, int kv_head)
        : kv_head(kv_head), tile(tile),
          q_tiles_before(args.plan.cu_q_tiles != nullptr ? args.plan.cu_q_tiles[tile.sequence] : 0),
          walk(args.plan, tile, kv_head * (args.num_heads / args.num_kv_heads),
               args.num_heads / args.num_kv_heads, args.num_heads, Traits::kBlockM,
               Traits::kBlockN) {}

    /// Whether some query of a tile does not see all keys of the block.
    __device__ bool needs_mask(const BackwardArguments& args, const QueryStep& step) const {
        const VisibleKeys visible(args.plan, tile, step.head, args.num_heads);
        const int m_first = step.m_tile * Traits::kBlockM;
        const int n_first = tile.tile * Traits::kBlockN;
        return n_first < visible(m_first + Traits::kBlockM - 1).x ||
               n_first + Traits::kBlockN > visible(m_first).y;
    }

    /// How many key tiles add to dq of a query tile before this one: those from the first that the
    /// query tile sees. Their blocks have smaller indices, so they run.
    __device__ int tiles_before(const BackwardArguments& args, const QueryStep& step) const {
        const VisibleKeys visible(args.plan, tile, step.head, args.num_heads);
        return tile.tile - visible(step.m_tile * Traits::kBlockM).x / Traits::kBlockN;
    }
};

}  // namespace lemo::cuda::segment_attention::hopper
