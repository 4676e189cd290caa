// Tiles, shared memory and arguments of the forward attention kernel for compute capability 9.0.
#pragma once

#include "common/hopper.h"
#include "segment_attention/plan.h"

namespace lemo::cuda::hopper {

template <typename Element_, int kHeadDim_>
struct ForwardTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    // A consumer warpgroup has 64 query rows. Two of them hide each other's softmax; with the small
    // head size a product is so short that it takes a third.
    static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;
    static constexpr int kBlockM = 64 * kConsumers;
    // A thread holds the scores of two tiles of keys, one of them rounded, and its output:
    // 64 + 32 + kHeadDim / 2 registers.
    static constexpr int kBlockN = 128;
    // Keys and values of the tile in work and of the next one.
    static constexpr int kStages = 2;
    static constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
    // The 65536 registers of a multiprocessor, in steps of eight a thread.
    static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;

    using Warpgroups = cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>;
    using ScoreMma = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::ss_op_selector<
            Element, Element, float,
            cute::Shape<cute::_64, cute::Int<kBlockN>, cute::Int<kHeadDim>>>(),
        Warpgroups{}));
    using OutputMma = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::rs_op_selector<
            Element, Element, float,
            cute::Shape<cute::_64, cute::Int<kHeadDim>, cute::Int<kBlockN>>,
            cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>(),
        Warpgroups{}));

    using LayoutQ = SwizzledRows<Element, kBlockM, kHeadDim>;
    using LayoutK = SwizzledRows<Element, kBlockN, kHeadDim>;
    using LayoutV = SwizzledColumns<Element, kBlockN, kHeadDim>;  // [head size, keys]
};

/// Everything a thread block has in shared memory. A `full` barrier says that a buffer was filled,
/// an `empty` one that all who read it are done.
template <typename Traits>
struct ForwardShared {
    using Element = typename Traits::Element;
    static constexpr int kStages = Traits::kStages;
    static constexpr int kKeyElements = Traits::kBlockN * Traits::kHeadDim;

    alignas(1024) Element q[Traits::kBlockM * Traits::kHeadDim];
    alignas(1024) Element k[kStages][kKeyElements];
    alignas(1024) Element v[kStages][kKeyElements];
    // Of its own, so that the next queries load while the output is written.
    alignas(1024) Element out[Traits::kBlockM * Traits::kHeadDim];
    Barrier q_full, q_empty;
    Barrier k_full[kStages], k_empty[kStages];
    Barrier v_full[kStages], v_empty[kStages];
    Barrier work_full[2], work_empty[2];
    int work[2];  // the tile that is in work, and the one after it
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
    int head_dim;
    float scale;
};

}  // namespace lemo::cuda::hopper
