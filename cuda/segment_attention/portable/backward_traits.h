// Tiles, scratch and arguments of the backward kernels, portable tier.
#pragma once

#include "segment_attention/plan.h"
#include "segment_attention/portable/kernels.h"
#include "segment_attention/portable/tile_ops.h"

namespace lemo::cuda::segment_attention::portable {

/// Tiles of the backward kernel. GPUs differ in shared memory: 8.0 and 9.0 have more than 160 KiB a
/// block, 8.6 and 8.9 have 99 KiB.
enum class TileSize { kLarge, kSmall };

template <typename Element_, int kHeadDim_, int kValueDim_, bool kCapped_, TileSize kTileSize>
struct BackwardTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_;
    static constexpr bool kCapped = kCapped_;
    static constexpr bool kLarge = kTileSize == TileSize::kLarge;
    // The gradients of keys and values live in registers:
    // kBlockN * (kHeadDim + kValueDim) / kThreads a thread.
    static constexpr int kBlockM = kHeadDim == 64 && kLarge    ? 128
                                   : kHeadDim > 128 && !kLarge ? 32
                                                               : 64;
    static constexpr int kBlockN = kHeadDim == 64 || (kHeadDim == 128 && kLarge) ? 128
                                   : kHeadDim == 256 && !kLarge                  ? 32
                                                                                 : 64;
    // With a second buffer dO of the next tile loads during all of this one.
    static constexpr int kBuffersOfdO = kLarge && kHeadDim < 256 ? 2 : 1;
    static constexpr int kNumWarps = kBlockM == 32 && kBlockN == 32 ? 4 : 8;
    static constexpr int kThreads = 32 * kNumWarps;
    // Warps along the rows of each mma, so that the part of a warp is about square: it then reads
    // the least shared memory.
    static constexpr int kScoreWarps = kBlockM == kBlockN && kBlockM > 32 ? 4 : 2;
    static constexpr int kKeyWarps = kBlockN == 128 ? 4 : kBlockN == 64 ? 2 : 1;
    static constexpr int kQueryWarps = kBlockM == 128 ? 4 : kNumWarps == 8 ? 2 : 1;

    template <int kRowWarps>
    using TiledMmaOf = cute::TiledMMA<
        MmaAtom<Element>, Layout<Shape<cute::Int<kRowWarps>, cute::Int<kNumWarps / kRowWarps>, _1>>,
        cute::Tile<cute::Int<16 * kRowWarps>, cute::Int<16 * kNumWarps / kRowWarps>, _16>>;
    using ScoreMma = TiledMmaOf<kScoreWarps>;  // [kBlockM, kBlockN]: scores and their gradient
    using KeyMma = TiledMmaOf<kKeyWarps>;      // [kBlockN, kHeadDim or kValueDim]: dk, dv
    using QueryMma = TiledMmaOf<kQueryWarps>;  // [kBlockM, kHeadDim]: dq

    using LayoutQ = SmemLayout<kBlockM, kHeadDim>;
    using LayoutdO = SmemLayout<kBlockM, kValueDim>;
    using LayoutK = SmemLayout<kBlockN, kHeadDim>;
    using LayoutV = SmemLayout<kBlockN, kValueDim>;
    using LayoutS = SmemLayout<kBlockM, kBlockN>;

    // K, V, two Q, dO, P, dS; two tiles of statistics.
    static constexpr int kSharedBytes =
        ((kBlockN + 2 * kBlockM) * kHeadDim + (kBlockN + kBuffersOfdO * kBlockM) * kValueDim +
         2 * kBlockM * kBlockN) *
            static_cast<int>(sizeof(Element)) +
        2 * kBlockM * static_cast<int>(sizeof(float2));
    static_assert(kSharedBytes <= (kLarge ? large_shared_bytes(kHeadDim) : 99 * 1024),
                  "all buffers fit into shared memory");
    /// Accumulators of dq that a thread holds for one query tile.
    static constexpr int kDqPerThread = kBlockM * kHeadDim / kThreads;
};

/// Scratch of the backward pass.
template <typename Traits>
struct BackwardScratch {
    PlanScratch plan;
    float2* statistics;
    float* dq_sums;
    int* added_tiles;
    float* sink_terms;
    int64_t cleared_bytes;  // that have to be zero before the main kernel runs, from `dq_sums` on

    BackwardScratch(const SegmentAttentionBackwardParams& params, Arena& arena)
        : plan(params.forward, arena) {
        const SegmentAttentionParams& p = params.forward;
        const int64_t num_heads = p.q.size(1);
        const int64_t tiles =
            num_heads * max_tiles(p.q.size(0), p.cu_q.size(0) - 1, Traits::kBlockM);
        statistics = arena.take<float2>(num_heads * p.q.size(0));
        const int64_t before = arena.bytes();
        dq_sums = arena.take<float>(tiles * Traits::kBlockM * Traits::kHeadDim);
        added_tiles = arena.take<int>(params.deterministic ? tiles : 0);
        cleared_bytes = arena.bytes() - before;
        sink_terms = arena.take<float>(params.dsinks ? num_heads * p.q.size(0) : 0);
    }
};

struct BackwardArguments {
    const void* q;
    const void* k;
    const void* v;
    const void* out;
    const void* dout;
    const float* lse;
    void* dq;
    void* dk;
    void* dv;
    // [heads, queries]: log2 of the sum of exponentials, and delta, the sum of out * dout of a row
    float2* statistics;
    // [heads, query tiles, kBlockM * kHeadDim] sums of dq, in the order of DqAccumulators
    float* dq_sums;
    int* added_tiles;   // [heads, query tiles], key tiles that have added to dq; null: in any order
    float* sink_terms;  // [heads, queries], see sink_term; not used without sinks
    AttentionPlan plan;
    int num_heads;
    int num_kv_heads;
    int head_dim;
    int value_dim;
    ScoreSettings score;
};

}  // namespace lemo::cuda::segment_attention::portable
