// A consumer warpgroup of the backward kernel: scores and their gradient for 64 keys, and what they
// add to dv, dk and dq.
#pragma once

#include <cmath>

#include "common/exp2.h"
#include "segment_attention/hopper/backward_epilogue.h"
#include "segment_attention/hopper/backward_scores.h"
#include "segment_attention/hopper/scheduler_barrier.h"

namespace lemo::cuda::segment_attention::hopper {

/// Run by all threads of a consumer warpgroup.
template <typename Traits>
__device__ void consume_backward(const BackwardArguments& args, BackwardShared<Traits>& shared,
                                 int warpgroup) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim, kValueDim = Traits::kValueDim;
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;

    typename Traits::ScoreMma score_mma;
    typename Traits::KeyMma key_mma;
    typename Traits::ValueMma value_mma;
    typename Traits::QueryMma query_mma;
    // Where operands lie is the same for all threads of a warpgroup. Of keys and values it is the
    // same in every step, too, but there are no registers to keep it: `first_thread` is set anew in
    // each step, so that the compiler works it out where it is needed.
    int first_thread = warpgroup * kWarpgroupThreads;
    const auto forget_operands = [&]() __attribute__((always_inline)) {
        asm volatile("" : "+r"(first_thread));
        first_thread = warp_uniform(first_thread);
    };
    const auto tile_of = []<typename TileLayout>(auto* first, TileLayout layout) {
        return make_tensor(make_smem_ptr(first), layout);
    };
    const auto keys_operand = [&](auto* tile, auto layout) {
        return score_mma.get_slice(first_thread).partition_fragment_A(tile_of(tile, layout));
    };
    const auto queries_operand = [&](auto* tile, auto layout) {
        return score_mma.get_slice(first_thread).partition_fragment_B(tile_of(tile, layout));
    };
    const auto query_columns_operand = [&](auto& mma, auto* tile, auto layout) {
        return mma.get_slice(first_thread).partition_fragment_B(tile_of(tile, layout));
    };

    auto dk = partition_fragment_C(key_mma, TileShape<kBlockN, kHeadDim>{});
    auto dv = partition_fragment_C(value_mma, TileShape<kBlockN, kValueDim>{});
    clear(dk);
    clear(dv);
    // Zeros are there before the first mma starts: set later, they would stop it.
    warpgroup_fence_operand(dk);
    warpgroup_fence_operand(dv);
    auto scores = partition_fragment_C(score_mma, TileShape<kBlockN, kBlockM>{});
    auto dscores = partition_fragment_C(score_mma, TileShape<kBlockN, kBlockM>{});

    // Both rounded, as left operands and as pairs of elements.
    auto probabilities = make_tensor<Element>(scores.layout());
    auto rounded = make_tensor<Element>(scores.layout());
    const auto probability_pairs = recast<uint32_t>(probabilities);
    const auto dscore_pairs = recast<uint32_t>(rounded);
    const DscoresPlace<Traits> dscores_place(warpgroup);

    constexpr bool kCapped = Traits::kCapped;
    const float scale_log2 =
        (kCapped ? args.score.softmax_scale : args.score.scale) * float(M_LOG2E);
    RingPosition<Traits::kStages> at;
    RingPosition<Traits::kDscoresStages> dscores_at, dq_at;
    uint32_t dq_parity = 1;
    const SchedulerBarrier<Traits::kFirstSchedulerBarrier, Traits::kConsumers> scheduler(warpgroup);

    const auto start_scores = [&]() __attribute__((always_inline)) {
        start_mma<false>(score_mma, keys_operand(shared.k, typename Traits::LayoutK{}),
                         queries_operand(shared.q[at.stage], typename Traits::LayoutQ{}), scores);
    };
    QueryStatistics<Traits> delta;
    // The scores of the step at `at` are there: makes them probabilities, or below a softcap its
    // tanh, while the mma runs that becomes their gradient. Afterwards no mma is under way: the
    // compiler does not follow one from one iteration of a loop into the next, and would wait for
    // each at once.
    const auto begin_step = [&]() __attribute__((always_inline)) {
        QueryStatistics<Traits> lse;
        if constexpr (!kCapped) load_statistics<Traits>(lse, shared.lse[at.stage]);
        shared.dout_full[at.stage].wait(at.parity);
        start_mma<false>(score_mma, keys_operand(shared.v, typename Traits::LayoutV{}),
                         queries_operand(shared.dout[at.stage], typename Traits::LayoutDout{}),
                         dscores);
        CUTE_UNROLL
        for (int i = 0; i < size(scores); i += 2) {
            if constexpr (kCapped) {
                scores(i) = tanh_of_log2(scores(i) * args.score.tanh_factor);
                scores(i + 1) = tanh_of_log2(scores(i + 1) * args.score.tanh_factor);
            } else {
                scores(i) = exp2_approximate(fmaf(scores(i), scale_log2, -lse[i / 4].x));
                scores(i + 1) = exp2_approximate(fmaf(scores(i + 1), scale_log2, -lse[i / 4].y));
            }
        }
        const BackwardStep step = shared.steps[at.stage];
        if (step.needs_mask) {
            hide_unseen(args, shared, step, warpgroup, kCapped ? kHiddenTanh : 0.0f, scores);
        }
        load_statistics<Traits>(delta, shared.delta[at.stage]);
        wait_mmas<0>();
    };
    // Makes probabilities of the tanh of two scores, and gives their gradient the slope of the
    // softcap. The sums of exponentials have no registers until here.
    const auto uncap = [&](int j) __attribute__((always_inline)) {
        const float2 lse = statistics_of(shared.lse[at.stage], j);
        const auto one = [&](float& score, float& dscore, float log_sum,
                             float mean) __attribute__((always_inline)) {
            const float tanh = score;
            score = tanh == kHiddenTanh ? 0.0f : exp2_approximate(fmaf(tanh, scale_log2, -log_sum));
            // With the mean taken from it here, what follows multiplies a difference once more.
            dscore = fmaf(dscore - mean, fmaf(-tanh, tanh, 1.0f), mean);
        };
        one(scores(j), dscores(j), lse.x, delta[j / 4].x);
        one(scores(j + 1), dscores(j + 1), lse.y, delta[j / 4].y);
    };
    // In the registers of the scores: when it is computed they are not needed, and are needed again
    // only once it has been stored.
    auto dq = make_tensor(scores.data(),
                          partition_fragment_C(query_mma, TileShape<kHeadDim, kBlockM>{}).layout());
    static_assert(size(dq) <= size(scores), "dq fits into the registers of the scores");
    const auto store_dq = [&]() __attribute__((always_inline)) {
        shared.dq_empty[warpgroup].wait(dq_parity);
        dq_parity ^= 1;
        auto* part = reinterpret_cast<float4*>(shared.dq[warpgroup]) + thread % kWarpgroupThreads;
        CUTE_UNROLL
        for (int i = 0; i < size(dq); i += 4) {
            part[i / 4 * kWarpgroupThreads] = make_float4(dq(i), dq(i + 1), dq(i + 2), dq(i + 3));
        }
        arrive_named(Traits::kFirstDqBarrier + warpgroup, Traits::kDqThreads);
        dq_at.advance();
    };
    const auto start_dq = [&]() __attribute__((always_inline)) {
        const auto slice = query_mma.get_slice(first_thread);
        start_mma<false>(
            query_mma,
            slice.partition_fragment_A(tile_of(shared.k, typename Traits::LayoutKTransposed{})),
            slice.partition_fragment_B(
                tile_of(shared.dscores[dq_at.stage], typename Traits::LayoutDscores{})),
            dq);
    };

    shared.q_full[0].wait(0);
    if (shared.steps[0].m_tile >= 0) {
        shared.kv_full.wait(0);
        start_scores();
        wait_mmas<0>();
        forget_operands();
        begin_step();
        for (bool first_step = true;; first_step = false) {
            // Gradient of the scores, 16 queries at a time, so that registers come free early.
            CUTE_UNROLL
            for (int i = 0; i < size(scores); i += 8) {
                CUTE_UNROLL
                for (int j = i; j < i + 8; j += 2) {
                    if constexpr (kCapped) uncap(j);
                    probability_pairs(j / 2) = round_pair<Element>(scores(j), scores(j + 1));
                    dscore_pairs(j / 2) =
                        round_pair<Element>(scores(j) * (dscores(j) - delta[j / 4].x),
                                            scores(j + 1) * (dscores(j + 1) - delta[j / 4].y));
                }
                store_matrices_transposed(dscores_place.of(shared.dscores[dscores_at.stage], i / 8),
                                          dscore_pairs(i / 2), dscore_pairs(i / 2 + 1),
                                          dscore_pairs(i / 2 + 2), dscore_pairs(i / 2 + 3));
            }
            publish_shared_writes();
            dscores_at.advance();

            // The compiler does not follow mmas around a branch. So dq before the first step and
            // the scores behind the last one are computed, of what lies there, and not used.
            scheduler.wait();  // also for the other one's gradient of scores of the step before
            start_dq();
            start_mma<true>(value_mma, as_register_operand<kBlockM>(probabilities),
                            query_columns_operand(value_mma, shared.dout[at.stage],
                                                  typename Traits::LayoutDoutTransposed{}),
                            dv);
            start_mma<true>(key_mma, as_register_operand<kBlockM>(rounded),
                            query_columns_operand(key_mma, shared.q[at.stage],
                                                  typename Traits::LayoutQTransposed{}),
                            dk);
            wait_mmas<2>();  // dq
            if (!first_step) store_dq();
            Barrier& step_empty = shared.step_empty[at.stage];
            at.advance();
            shared.q_full[at.stage].wait(at.parity);
            start_scores();
            scheduler.let_next();
            step_empty.arrive();  // for its loads; 32 arrivals take time, which the mmas hide
            wait_mmas<0>();
            step_empty.arrive_warp();
            if (shared.steps[at.stage].m_tile < 0) break;
            forget_operands();
            begin_step();
        }
        scheduler.finish();  // also for the other one's gradient of the last scores
        start_dq();
        wait_mmas<0>();
        store_dq();
    } else {
        scheduler.finish();
    }

    store_key_gradients(args, shared, dk, dv);
}

}  // namespace lemo::cuda::segment_attention::hopper
