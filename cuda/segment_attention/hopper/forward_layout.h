// Tiles, registers, barriers, shared memory, scratch and arguments of the forward kernel, Hopper
// tier.
#pragma once

#include "common/hopper.h"
#include "segment_attention/plan.h"

namespace lemo::cuda::segment_attention::hopper {

template <typename Element_, int kHeadDim_, int kValueDim_, bool kCapped_>
struct ForwardTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_;
    static constexpr bool kCapped = kCapped_;
    // A consumer warpgroup has 64 query rows. The softmax of one overlaps with the mma of the
    // other; with the small head size an mma is so short that it takes a third.
    static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;
    static constexpr int kBlockM = 64 * kConsumers;
    // A thread holds the scores of two tiles of keys, one of them rounded, and its output:
    // kBlockN * 3 / 4 + kValueDim / 2 registers. Two stages of the largest keys and values fill
    // shared memory.
    static constexpr int kBlockN = kHeadDim == 256 ? 80 : 128;
    // Keys and values of the tile in work and of the next one.
    static constexpr int kStages = 2;
    static constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
    using Registers = std::conditional_t<kConsumers == 2, RegisterBudget<40, 232, kConsumers>,
                                         RegisterBudget<32, 160, kConsumers>>;
    // Named barriers: those of the scheduler, one for each consumer.
    static constexpr int kFirstSchedulerBarrier = 1;
    static_assert(kFirstSchedulerBarrier + kConsumers <= kNamedBarriers,
                  "a named barrier for each consumer warpgroup, behind that of __syncthreads()");
    // The output passes through the place of the queries where shared memory has none to spare.
    static constexpr bool kOutputInQ = kHeadDim > 128;
    // A consumer warpgroup is done with its queries; one for each consumer.
    static constexpr int kFirstOutputBarrier = kFirstSchedulerBarrier + kConsumers;
    static_assert(kFirstOutputBarrier + kConsumers <= kNamedBarriers,
                  "and another one where the output waits for the queries");

    using Warpgroups = cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>;
    using ScoreMma = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::ss_op_selector<
            Element, Element, float,
            cute::Shape<cute::_64, cute::Int<kBlockN>, cute::Int<kHeadDim>>>(),
        Warpgroups{}));
    using OutputMma = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::rs_op_selector<
            Element, Element, float,
            cute::Shape<cute::_64, cute::Int<kValueDim>, cute::Int<kBlockN>>,
            cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>(),
        Warpgroups{}));

    using LayoutQ = SwizzledRows<Element, kBlockM, kHeadDim>;
    using LayoutK = SwizzledRows<Element, kBlockN, kHeadDim>;
    using LayoutV = SwizzledColumns<Element, kBlockN, kValueDim>;  // [head size, keys]
};

/// Everything a thread block has in shared memory. A `full` barrier says that a buffer was filled,
/// an `empty` one that all who read it are done.
template <typename Traits>
struct ForwardShared {
    using Element = typename Traits::Element;
    static constexpr int kStages = Traits::kStages;
    static constexpr bool kOutputInQ = Traits::kOutputInQ;

    alignas(1024) Element q[Traits::kBlockM * Traits::kHeadDim];
    alignas(1024) Element k[kStages][Traits::kBlockN * Traits::kHeadDim];
    alignas(1024) Element v[kStages][Traits::kBlockN * Traits::kValueDim];
    // Of its own, so that the next queries load while the output is written.
    alignas(kOutputInQ ? 16
                       : 1024) Element out[kOutputInQ ? 8 : Traits::kBlockM * Traits::kValueDim];
    Barrier q_full, q_empty;
    Barrier k_full[kStages], k_empty[kStages];
    Barrier v_full[kStages], v_empty[kStages];
    Barrier work_full[2], work_empty[2];
    int work[2];  // the tile that is in work, and the one after it

    /// How many arrivals complete a phase of each barrier. For one thread.
    __device__ void init_barriers() {
        constexpr int kConsumerThreads = kWarpgroupThreads * Traits::kConsumers;
        constexpr int kConsumerWarps = kConsumerThreads / 32;
        q_full.init(1);
        q_empty.init(kOutputInQ ? kConsumerThreads : kConsumerWarps);
        for (int stage = 0; stage < kStages; ++stage) {
            k_full[stage].init(1);
            v_full[stage].init(1);
            k_empty[stage].init(kConsumerWarps);
            v_empty[stage].init(kConsumerWarps);
        }
        for (int slot = 0; slot < 2; ++slot) {
            work_full[slot].init(1);
            work_empty[slot].init(kConsumerThreads);
        }
        publish_barriers();
    }
};

/// Scratch of the forward pass.
struct ForwardScratch {
    int* next_work;
    PlanScratch plan;

    ForwardScratch(const SegmentAttentionParams& params, Arena& arena)
        : next_work(arena.take<int>(1)), plan(params, arena) {}
};

struct ForwardArguments {
    CUtensorMap q;
    CUtensorMap k;
    CUtensorMap v;
    void* out;
    float* lse;
    int* next_work;  // zero before the kernel runs
    AttentionPlan plan;
    int num_heads;
    int num_kv_heads;
    int heads_at_once;  // query heads of a section of the work; whole groups of a key/value head
    int value_dim;
    ScoreSettings score;
};

}  // namespace lemo::cuda::segment_attention::hopper
