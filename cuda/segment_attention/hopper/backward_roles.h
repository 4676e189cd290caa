// The consumer warpgroups of the backward kernel with heads above 128. Each has a role, since dk
// and dv of 64 keys together leave too few registers of one:
//
// - the first computes scores, probabilities and dv. It leaves for the other one what turns the
//   gradient of a probability into that of its score: the probability, times the slope of the
//   softcap where there is one (its weight);
// - the second computes the gradients of probabilities and of scores, and dk.
//
// Each adds half of every step's dq to scratch, from its registers, which leaves shared memory to
// two stages of queries. The first works up to a step ahead.
//
// Budgets (256 columns, 64 keys, 64 queries a step; those of 192 are in docs/design/kernels.md):
// - shared memory: K and V 64 KiB, two stages of Q and of dout 128, two gradients of scores 16,
//   weights 16, together 224 of 227 KiB, with statistics and barriers 226;
// - registers of a thread: 128 of dv or dk, 64 of dq (of which scores or their gradient take 32
//   before), 16 of a rounded left operand: 208 of 240, beside addresses and statistics;
// - time: a step takes the tensor cores 2560 cycles. It reads and writes 352 KiB of shared memory
//   (2800 cycles at 128 bytes) and passes 128 KiB through the L2 cache, twice as much as with heads
//   of 128 columns, of which the half are reductions. Measured: 449 TFLOP/s on an H200, 45% of the
//   tensor cores' peak (192 and 128 columns: 402, 41%).
//
// The roles meet at barriers in shared memory, where every lane arrives, and not at named ones:
// racecheck does not follow bar.arrive, and synccheck takes warps that are at one named barrier in
// different places of the code for a warp that has come apart.
//
// Why nothing is overwritten too early, and no phase of a barrier is missed:
// - weights: one buffer. The first role writes step j's when the gradients of scores of step j - 1
//   are full, for which the second role has read the weights of step j - 1.
// - gradients of scores: two buffers. The first role has read step j - 2's before it says that the
//   weights of step j are full, and the second role writes step j's after that. The second role's
//   own warps have read step j - 2's before they say that those of step j - 1 are full, for which
//   all of them wait.
// - a stage of queries: both roles arrive at `step_empty` when their mmas of the step are done.
// So "weights are full" and "gradients are full" alternate, and each role waits for every phase.
// Neither role waits for the other one's progress in a later step: so none waits for ever.
#pragma once

#include <cmath>

#include "common/exp2.h"
#include "segment_attention/hopper/backward_epilogue.h"
#include "segment_attention/hopper/backward_scores.h"

namespace lemo::cuda::segment_attention::hopper {

inline constexpr int kProbabilityRole = 0, kGradientRole = 1;

/// Whether scores and their gradient are in the registers of dq: where they have as many as one of
/// its tiles of 64 rows. (Where they have not, ptxas serialises every wgmma: C7511.)
template <typename Traits>
inline constexpr bool kAliasDq = Traits::kDqColumns == Traits::kBlockM;

/// Where a step's part of dq is added.
struct DqPlace {
    int64_t tile_index;
    int tiles_before;
};

/// What both roles have: operands in shared memory, and dq.
template <typename Traits, int kRole>
struct BackwardRole {
    using Element = typename Traits::Element;
    const BackwardArguments& args;
    BackwardShared<Traits>& shared;
    // Added to the places of K and V, so that the compiler works out their operands anew in each
    // step (see consume_backward); with constant places it keeps them in memory.
    int nothing = 0;
    // So a step's stage and parity are the same for both, and the stage before is the other one.
    static_assert(Traits::kStages == 2 && Traits::kDscoresStages == 2,
                  "two buffers of queries and two of gradients of scores");
    typename Traits::ScoreMma score_mma;
    // dv with the output gradients, or dk with the queries
    static constexpr bool kMakesDv = kRole == kProbabilityRole;
    static constexpr int kColumns = kMakesDv ? Traits::kValueDim : Traits::kHeadDim;
    std::conditional_t<kMakesDv, typename Traits::ValueMma, typename Traits::KeyMma> gradient_mma;
    typename Traits::QueryMma query_mma;

    __device__ BackwardRole(const BackwardArguments& args, BackwardShared<Traits>& shared)
        : args(args), shared(shared) {}

    __device__ __forceinline__ void forget_operands() {
        asm volatile("" : "+r"(nothing));
        nothing = warp_uniform(nothing);
    }
    template <typename First, typename Second>
    using ByRole = std::conditional_t<kMakesDv, First, Second>;
    template <typename TileLayout>
    __device__ __forceinline__ static auto tile_of(Element* first, TileLayout layout) {
        return cute::make_tensor(cute::make_smem_ptr(first), layout);
    }

    /// Keys times queries, or values times output gradients.
    template <typename Scores>
    __device__ __forceinline__ void start_scores(Element* keys, Element* queries, Scores& scores) {
        using Keys = ByRole<typename Traits::LayoutK, typename Traits::LayoutV>;
        using Queries = ByRole<typename Traits::LayoutQ, typename Traits::LayoutDout>;
        const auto slice = score_mma.get_slice(0);
        start_mma<false>(score_mma, slice.partition_fragment_A(tile_of(keys + nothing, Keys{})),
                         slice.partition_fragment_B(tile_of(queries, Queries{})), scores);
    }

    /// Adds to dk, with the queries, or to dv, with the output gradients.
    template <typename Rounded, typename Gradient>
    __device__ __forceinline__ void start_gradient(Rounded& rounded, Element* queries,
                                                   Gradient& gradient) {
        using Queries =
            ByRole<typename Traits::LayoutDoutTransposed, typename Traits::LayoutQTransposed>;
        const auto slice = gradient_mma.get_slice(0);
        start_mma<true>(gradient_mma, as_register_operand<Traits::kBlockM>(rounded),
                        slice.partition_fragment_B(tile_of(queries, Queries{})), gradient);
    }

    template <typename Dq>
    __device__ __forceinline__ void start_dq(int dscores_stage, Dq& dq) {
        const auto slice = query_mma.get_slice(kRole * kWarpgroupThreads);
        start_mma<false>(query_mma,
                         slice.partition_fragment_A(
                             tile_of(shared.k + nothing, typename Traits::LayoutKTransposed{})),
                         slice.partition_fragment_B(tile_of(shared.dscores[dscores_stage],
                                                            typename Traits::LayoutDscores{})),
                         dq);
    }

    __device__ __forceinline__ DqPlace dq_place(int stage) const {
        const BackwardStep& step = shared.steps[stage];
        return {args.tile_index(step.head, step.packed_tile), step.tiles_before};
    }

    /// Adds this role's part of dq; in the order of the key tiles if asked to be deterministic.
    template <typename Dq>
    __device__ __forceinline__ void add_dq(const DqPlace& place, const Dq& dq) const {
        constexpr int kPart = Traits::kDqPart;
        // What follows from it is worked out in each step: there are no registers to keep it.
        unsigned thread = threadIdx.x % kWarpgroupThreads;
        asm volatile("" : "+r"(thread));
        int* added = args.added_tiles == nullptr ? nullptr : args.added_tiles + place.tile_index;
        if (added != nullptr) {
            // Every warp of a block counts, and none of a block adds before all of those before.
            constexpr int kWarps = Traits::kConsumers * kWarpgroupThreads / 32;
            wait_for_count(added, place.tiles_before * kWarps);
        }
        float* to =
            args.dq_sums + (place.tile_index * Traits::kConsumers + kRole) * kPart + thread * 4;
        CUTE_UNROLL
        for (int i = 0; i < cute::size(dq); i += 4) {
            add_vector(to + i * kWarpgroupThreads, dq(i), dq(i + 1), dq(i + 2), dq(i + 3));
        }
        if (added != nullptr) {
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
            __syncwarp();
            if (thread % 32 == 0) {
                asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(added) : "memory");
            }
        }
    }

    /// Stores dk or dv when both roles are done with keys and values.
    template <typename Gradient>
    __device__ __forceinline__ void store(const Gradient& gradient, Element* area, void* to,
                                          int columns) const {
        shared.keys_empty.arrive();
        shared.keys_empty.wait(0);
        store_gradient<Traits, kColumns>(args, shared, gradient, area, to, columns);
    }
};

/// The first role; run by all threads of its warpgroup.
template <typename Traits>
__device__ void consume_probabilities(const BackwardArguments& args,
                                      BackwardShared<Traits>& shared) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr bool kCapped = Traits::kCapped;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    BackwardRole<Traits, kProbabilityRole> role(args, shared);

    auto dv =
        partition_fragment_C(role.gradient_mma, TileShape<kBlockN, decltype(role)::kColumns>{});
    clear(dv);
    warpgroup_fence_operand(dv);  // see consume_backward
    auto dq = partition_fragment_C(role.query_mma, TileShape<Traits::kHeadDim, kBlockM>{});
    // They are computed when dq has been added, and rounded before it is computed.
    auto own = partition_fragment_C(role.score_mma, TileShape<kBlockN, kBlockM>{});
    auto scores = make_tensor(kAliasDq<Traits> ? dq.data() : own.data(), own.layout());
    auto probabilities = make_tensor<Element>(scores.layout());
    const auto probability_pairs = recast<uint32_t>(probabilities);

    const float scale_log2 =
        (kCapped ? args.score.softmax_scale : args.score.scale) * float(M_LOG2E);
    RingPosition<Traits::kStages> at;
    // The gradients of scores of the step before that at `at`. Before the first step nobody has
    // filled them: the wait ends at once.
    const auto stage_before = [&]() __attribute__((always_inline)) { return at.stage ^ 1; };
    const auto wait_for_dscores = [&]() __attribute__((always_inline)) {
        const uint32_t parity = at.stage == 0 ? at.parity ^ 1 : at.parity;
        shared.dscores_full[stage_before()].wait(parity);
    };
    // The scores are there: rounds probabilities, and leaves the weights. The gradients of scores
    // of the step before are there afterwards.
    const auto make_weights = [&]() __attribute__((always_inline)) {
        QueryStatistics<Traits> lse;
        load_statistics<Traits>(lse, shared.lse[at.stage]);
        CUTE_UNROLL
        for (int i = 0; i < size(scores); ++i) {
            const float log_sum = i % 2 == 0 ? lse[i / 4].x : lse[i / 4].y;
            scores(i) = kCapped ? tanh_of_log2(scores(i) * args.score.tanh_factor)
                                : exp2_approximate(fmaf(scores(i), scale_log2, -log_sum));
        }
        const BackwardStep step = shared.steps[at.stage];
        if (step.needs_mask) {
            hide_unseen(args, shared, step, 0, kCapped ? kHiddenTanh : 0.0f, scores);
        }
        wait_for_dscores();
        auto* weights = reinterpret_cast<float4*>(shared.weights) + thread;
        CUTE_UNROLL
        for (int i = 0; i < size(scores); i += 4) {
            float weight[4], probability[4];
            CUTE_UNROLL
            for (int j = 0; j < 4; ++j) {
                const float score = scores(i + j);
                probability[j] = weight[j] = score;
                if constexpr (kCapped) {
                    const float log_sum = j % 2 == 0 ? lse[i / 4].x : lse[i / 4].y;
                    probability[j] = score == kHiddenTanh
                                         ? 0.0f
                                         : exp2_approximate(fmaf(score, scale_log2, -log_sum));
                    weight[j] = probability[j] * fmaf(-score, score, 1.0f);
                }
            }
            weights[i / 4 * kWarpgroupThreads] =
                make_float4(weight[0], weight[1], weight[2], weight[3]);
            probability_pairs(i / 2) = round_pair<Element>(probability[0], probability[1]);
            probability_pairs(i / 2 + 1) = round_pair<Element>(probability[2], probability[3]);
        }
        shared.weights_full.arrive();
    };

    shared.q_full[0].wait(0);
    if (shared.steps[0].m_tile >= 0) {
        shared.kv_full.wait(0);
        role.start_scores(shared.k, shared.q[0], scores);
        wait_mmas<0>();
        DqPlace place{};  // of the step before
        for (bool first_step = true;; first_step = false) {
            role.forget_operands();
            make_weights();
            shared.dout_full[at.stage].wait(at.parity);
            // As in consume_backward, dq before the first step and the scores behind the last one
            // are computed of what lies there, and not used.
            role.start_dq(stage_before(), dq);
            role.start_gradient(probabilities, shared.dout[at.stage], dv);
            wait_mmas<1>();  // dq
            if (!first_step) role.add_dq(place, dq);
            place = role.dq_place(at.stage);
            Barrier& step_empty = shared.step_empty[at.stage];
            at.advance();
            shared.q_full[at.stage].wait(at.parity);
            role.start_scores(shared.k, shared.q[at.stage], scores);
            step_empty.arrive();  // for its loads
            wait_mmas<0>();
            step_empty.arrive_warp();
            if (shared.steps[at.stage].m_tile < 0) break;
        }
        wait_for_dscores();
        role.start_dq(stage_before(), dq);
        wait_mmas<0>();
        role.add_dq(place, dq);
    }
    role.store(dv, shared.v, args.dv, args.value_dim);
}

/// The second role; run by all threads of its warpgroup.
template <typename Traits>
__device__ void consume_gradients(const BackwardArguments& args, BackwardShared<Traits>& shared) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    BackwardRole<Traits, kGradientRole> role(args, shared);

    auto dk =
        partition_fragment_C(role.gradient_mma, TileShape<kBlockN, decltype(role)::kColumns>{});
    clear(dk);
    warpgroup_fence_operand(dk);
    auto dq = partition_fragment_C(role.query_mma, TileShape<Traits::kHeadDim, kBlockM>{});
    auto own = partition_fragment_C(role.score_mma, TileShape<kBlockN, kBlockM>{});
    auto dscores = make_tensor(kAliasDq<Traits> ? dq.data() : own.data(), own.layout());
    auto rounded = make_tensor<Element>(dscores.layout());
    const auto dscore_pairs = recast<uint32_t>(rounded);
    const DscoresPlace<Traits> dscores_place(0);

    RingPosition<Traits::kStages> at;
    RingPosition<1> weights_at;
    // The gradients of probabilities are there: makes those of scores.
    const auto make_dscores = [&]() __attribute__((always_inline)) {
        QueryStatistics<Traits> delta;
        load_statistics<Traits>(delta, shared.delta[at.stage]);
        shared.weights_full.wait(weights_at.parity);
        weights_at.advance();
        const auto* weights = reinterpret_cast<const float4*>(shared.weights) + thread;
        CUTE_UNROLL
        for (int i = 0; i < size(dscores); i += 8) {
            CUTE_UNROLL
            for (int j = i; j < i + 8; j += 4) {
                const float4 weight = weights[j / 4 * kWarpgroupThreads];
                const float2 mean = delta[j / 4];
                dscore_pairs(j / 2) = round_pair<Element>(weight.x * (dscores(j) - mean.x),
                                                          weight.y * (dscores(j + 1) - mean.y));
                dscore_pairs(j / 2 + 1) = round_pair<Element>(weight.z * (dscores(j + 2) - mean.x),
                                                              weight.w * (dscores(j + 3) - mean.y));
            }
            store_matrices_transposed(dscores_place.of(shared.dscores[at.stage], i / 8),
                                      dscore_pairs(i / 2), dscore_pairs(i / 2 + 1),
                                      dscore_pairs(i / 2 + 2), dscore_pairs(i / 2 + 3));
        }
        publish_shared_writes();
        Barrier& full = shared.dscores_full[at.stage];
        full.arrive();
        full.wait(at.parity);  // for the other warps of this role
    };

    shared.q_full[0].wait(0);
    if (shared.steps[0].m_tile >= 0) {
        shared.kv_full.wait(0);
        shared.dout_full[0].wait(0);
        role.start_scores(shared.v, shared.dout[0], dscores);
        wait_mmas<0>();
        while (true) {
            role.forget_operands();
            make_dscores();
            role.start_dq(at.stage, dq);
            role.start_gradient(rounded, shared.q[at.stage], dk);
            wait_mmas<1>();  // dq
            role.add_dq(role.dq_place(at.stage), dq);
            Barrier& step_empty = shared.step_empty[at.stage];
            at.advance();
            shared.q_full[at.stage].wait(at.parity);
            shared.dout_full[at.stage].wait(at.parity);
            role.start_scores(shared.v, shared.dout[at.stage], dscores);
            step_empty.arrive();  // for its loads
            wait_mmas<0>();
            step_empty.arrive_warp();
            if (shared.steps[at.stage].m_tile < 0) break;
        }
    }
    scale_gradient(dk, args.score.scale);
    role.store(dk, shared.k, args.dk, args.head_dim);
}

}  // namespace lemo::cuda::segment_attention::hopper
