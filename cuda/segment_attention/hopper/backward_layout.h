// Tiles, registers, barriers, shared memory, scratch and arguments of the backward kernels, Hopper
// tier.
#pragma once

#include "common/hopper.h"
#include "segment_attention/plan.h"

namespace lemo::cuda::segment_attention::hopper {

template <typename Element_, int kHeadDim_, int kValueDim_, bool kCapped_>
struct BackwardTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_;
    static constexpr bool kCapped = kCapped_;
    static constexpr int kConsumers = 2;
    // How the consumers share the work. By keys: each has 64 of them and their gradients, which are
    // (kHeadDim + kValueDim) / 2 registers a thread. With larger heads these would be 160 or 256,
    // so the consumers have different roles there: one makes probabilities and dv of all keys, the
    // other one the gradient of the scores and dk (backward_roles.h). (160 leave 80 registers, but
    // even with 16 queries a step ptxas serialised every wgmma, C7511.)
    static constexpr bool kSplitRoles = kHeadDim > 128;
    static constexpr int kBlockN = kSplitRoles ? 64 : 64 * kConsumers;  // keys of a thread block
    // Queries of a step: scores and their gradient are kBlockM registers a thread, and shared
    // memory holds three gradients of scores beside two stages of queries.
    static constexpr int kBlockM = kHeadDim == 64 ? 96 : 64;
    static constexpr int kStages = 2;
    // A warpgroup writes one while the other one, up to a step behind, reads one of the two before.
    // With fewer of them the scheduler barrier would not keep writers behind readers. Roles have
    // only one writer, which waits for both readers of the step before last.
    static constexpr int kDscoresStages = kSplitRoles ? 2 : 3;
    static constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
    using Registers = RegisterBudget<24, 240, kConsumers>;

    // Named barriers, where the consumers share the keys. Those of the scheduler, one for each
    // consumer.
    static constexpr int kFirstSchedulerBarrier = 1;
    // The consumers are done with keys and values.
    static constexpr int kKeysBarrier = kFirstSchedulerBarrier + kConsumers;
    static constexpr int kKeysThreads = kWarpgroupThreads * kConsumers;
    // A consumer's part of dq is there for the warp that adds it to scratch; one for each consumer.
    static constexpr int kFirstDqBarrier = kKeysBarrier + 1;
    static constexpr int kDqThreads = kWarpgroupThreads + 32;
    static_assert(kFirstDqBarrier + kConsumers <= kNamedBarriers,
                  "every named barrier has a number of its own, behind that of __syncthreads()");

    template <int kAlongM, int kAlongN>
    using Warpgroups = cute::Layout<cute::Shape<cute::Int<kAlongM>, cute::Int<kAlongN>, cute::_1>>;
    template <int kM, int kN, int kK>
    using Tile = cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::Int<kK>>;
    static constexpr auto kByRows = cute::SM90::GMMA::Major::K;
    static constexpr auto kByColumns = cute::SM90::GMMA::Major::MN;

    // Keys lie along the rows of scores and of their gradient: so both are in registers what the
    // gradients of values and keys need as left operands, and pass through memory for dq only.
    using ScoreMma = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::ss_op_selector<Element, Element, float, Tile<64, kBlockM, kHeadDim>>(),
        Warpgroups<kBlockN / 64, 1>{}));
    // [keys, head size]: dk and dv
    template <int kColumns>
    using GradientMma = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::rs_op_selector<Element, Element, float, Tile<64, kColumns, kBlockM>,
                                         kByRows, kByColumns>(),
        Warpgroups<kBlockN / 64, 1>{}));
    using KeyMma = GradientMma<kHeadDim>;
    using ValueMma = GradientMma<kValueDim>;
    // [head size, queries]: dq transposed, since 64 rows a warpgroup fit the head size, but not
    // every number of queries. The warpgroups share the head size where it is even in that, in
    // turns of 64 rows, and else the queries.
    static constexpr bool kShareHeadDim = kHeadDim % 128 == 0;
    static constexpr int kDqColumns = kShareHeadDim ? kBlockM : kBlockM / 2;   // a warpgroup's
    static constexpr int kDqRowTiles = kHeadDim / (kShareHeadDim ? 128 : 64);  // likewise, of 64
    using QueryMma = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::ss_op_selector<Element, Element, float, Tile<64, kDqColumns, kBlockN>,
                                         kByColumns, kByRows>(),
        std::conditional_t<kShareHeadDim, Warpgroups<2, 1>, Warpgroups<1, 2>>{}));

    using LayoutK = SwizzledRows<Element, kBlockN, kHeadDim>;
    using LayoutKTransposed = SwizzledColumns<Element, kBlockN, kHeadDim>;
    using LayoutV = SwizzledRows<Element, kBlockN, kValueDim>;
    using LayoutQ = SwizzledRows<Element, kBlockM, kHeadDim>;
    using LayoutQTransposed = SwizzledColumns<Element, kBlockM, kHeadDim>;
    using LayoutDout = SwizzledRows<Element, kBlockM, kValueDim>;
    using LayoutDoutTransposed = SwizzledColumns<Element, kBlockM, kValueDim>;
    using LayoutDscores = SwizzledRows<Element, kBlockM, kBlockN>;  // [queries, keys]

    /// Accumulators of dq that a warpgroup adds to scratch in one step.
    static constexpr int kDqPart = 64 * kDqRowTiles * kDqColumns;
};

/// One step of a thread block's walk: a query tile of one head.
struct BackwardStep {
    int head;
    int m_tile;      // -1: the walk is over
    int needs_mask;  // some query of the tile does not see all keys of the block
    // For roles, which add to dq by themselves.
    int packed_tile;   // of the queries
    int tiles_before;  // key tiles that add to these queries before this one
};

/// Everything a thread block has in shared memory. A `full` barrier says that a buffer was filled,
/// an `empty` one that all who read it are done.
template <typename Traits>
struct BackwardShared {
    using Element = typename Traits::Element;
    static constexpr int kStages = Traits::kStages;
    static constexpr bool kSplitRoles = Traits::kSplitRoles;

    alignas(1024) Element k[Traits::kBlockN * Traits::kHeadDim];
    alignas(1024) Element v[Traits::kBlockN * Traits::kValueDim];
    alignas(1024) Element q[kStages][Traits::kBlockM * Traits::kHeadDim];
    alignas(1024) Element dout[kStages][Traits::kBlockM * Traits::kValueDim];
    alignas(1024) Element dscores[Traits::kDscoresStages][Traits::kBlockM * Traits::kBlockN];
    // By keys: parts of dq for the warp that adds them.
    alignas(kSplitRoles ? 16
                        : 1024) float dq[Traits::kConsumers][kSplitRoles ? 4 : Traits::kDqPart];
    // By roles: what makes the gradient of scores of that of probabilities, in the order of the
    // accumulators.
    alignas(16) float weights[kSplitRoles ? Traits::kBlockN * Traits::kBlockM : 4];
    alignas(16) float lse[kStages][Traits::kBlockM];    // of log2; comes with q
    alignas(16) float delta[kStages][Traits::kBlockM];  // comes with dout
    BackwardStep steps[kStages];                        // comes with q
    // Here and not in the registers of the consumers, which have none to spare.
    SequenceTile tile;
    int kv_head;
    Barrier kv_full;
    Barrier q_full[kStages], dout_full[kStages];
    Barrier step_empty[kStages];  // of all that comes with q and dout
    Barrier dq_empty[Traits::kConsumers];
    // Of roles. The gradients of scores are full: the weights have been read as well.
    Barrier weights_full;
    Barrier dscores_full[Traits::kDscoresStages];
    Barrier keys_empty;  // K and V, and so free for results

    /// How many arrivals complete a phase of each barrier. For one thread.
    __device__ void init_barriers() {
        constexpr int kConsumerThreads = kWarpgroupThreads * Traits::kConsumers;
        constexpr int kConsumerWarps = kConsumerThreads / 32;
        kv_full.init(1);
        for (int stage = 0; stage < kStages; ++stage) {
            q_full[stage].init(1);
            dout_full[stage].init(1);
            // Each lane for what it loaded, then each warp for its mmas.
            step_empty[stage].init(kConsumerThreads + kConsumerWarps);
        }
        for (int warpgroup = 0; warpgroup < Traits::kConsumers; ++warpgroup) {
            dq_empty[warpgroup].init(1);
        }
        if constexpr (kSplitRoles) {
            weights_full.init(kWarpgroupThreads);
            for (Barrier& full : dscores_full) full.init(kWarpgroupThreads);
            keys_empty.init(kConsumerThreads);
        }
        publish_barriers();
    }
};

/// Scratch of the backward pass.
template <typename Traits>
struct BackwardScratch {
    PlanScratch plan;
    float* tile_lse;
    float* tile_delta;
    float* dq_sums;
    int* added_tiles;
    float* sink_terms;

    BackwardScratch(const SegmentAttentionBackwardParams& params, Arena& arena)
        : plan(params.forward, arena) {
        const SegmentAttentionParams& p = params.forward;
        const int64_t tiles =
            p.q.size(1) * max_tiles(p.q.size(0), p.cu_q.size(0) - 1, Traits::kBlockM);
        const int64_t rows = tiles * Traits::kBlockM;
        tile_lse = arena.take<float>(rows);
        tile_delta = arena.take<float>(rows);
        dq_sums = arena.take<float>(rows * Traits::kHeadDim);
        added_tiles = arena.take<int>(params.deterministic ? tiles : 0);
        sink_terms = arena.take<float>(params.dsinks ? p.q.size(1) * p.q.size(0) : 0);
    }
};

struct BackwardArguments {
    CUtensorMap q;
    CUtensorMap k;
    CUtensorMap v;
    CUtensorMap dout;
    const void* out;
    const void* dout_rows;
    const float* lse;
    void* dq;
    void* dk;
    void* dv;
    // [heads, query tiles, kBlockM]: log2 of the sum of exponentials, infinite for rows that do not
    // exist or see no key; and the sum of out * dout of a row
    float* tile_lse;
    float* tile_delta;
    float* dq_sums;  // [heads, query tiles, warpgroups, kDqPart], in the order of the accumulators
    int* added_tiles;   // [heads, query tiles], key tiles that have added to dq; null: in any order
    float* sink_terms;  // [heads, queries], see sink_term; not used without sinks
    AttentionPlan plan;
    int num_heads;
    int num_kv_heads;
    int heads_at_once;  // key/value heads that are worked on side by side
    int head_dim;
    int value_dim;
    ScoreSettings score;

    /// Number of a packed query tile of a head.
    __device__ int64_t tile_index(int head, int packed_tile) const {
        return int64_t{head} * plan.max_q_tiles + packed_tile;
    }
};

}  // namespace lemo::cuda::segment_attention::hopper
