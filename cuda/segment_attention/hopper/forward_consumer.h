// A consumer warpgroup of the forward kernel: scores, softmax and output of 64 query rows.
#pragma once

#include "segment_attention/hopper/forward_epilogue.h"
#include "segment_attention/hopper/scheduler_barrier.h"

namespace lemo::cuda::segment_attention::hopper {

/// The compiler would move a wait for an mma before the computations that are written before it,
/// since registers are no memory. A store that depends on the sums and never happens, as they are
/// not negative, keeps the order.
template <typename Traits>
__device__ __forceinline__ void finish_before_waiting(const float (&sums)[kThreadRows],
                                                      ForwardShared<Traits>& shared) {
    asm volatile(
        "{\n"
        ".reg .pred never;\n"
        "setp.lt.f32 never, %1, 0f00000000;\n"
        "@never st.shared.f32 [%0], %1;\n"
        "}" ::"r"(shared_address(shared.work)),
        "f"(sums[0] + sums[1])
        : "memory");
}

/// Run by all threads of a consumer warpgroup, while there is work.
template <typename Traits>
__device__ void consume_forward(const ForwardArguments& args, ForwardShared<Traits>& shared,
                                int warpgroup) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kValueDim = Traits::kValueDim, kStages = Traits::kStages;

    typename Traits::ScoreMma score_mma;
    typename Traits::OutputMma output_mma;
    // Where operands lie is the same for all threads of a warpgroup.
    const auto score_slice = score_mma.get_slice(warpgroup * kWarpgroupThreads);
    const auto output_slice = output_mma.get_slice(warpgroup * kWarpgroupThreads);
    const auto q_operand = score_slice.partition_fragment_A(
        make_tensor(make_smem_ptr(shared.q), typename Traits::LayoutQ{}));
    const auto k_operand = [&](int stage) {
        return score_slice.partition_fragment_B(
            make_tensor(make_smem_ptr(shared.k[stage]), typename Traits::LayoutK{}));
    };
    const auto v_operand = [&](int stage) {
        return output_slice.partition_fragment_B(
            make_tensor(make_smem_ptr(shared.v[stage]), typename Traits::LayoutV{}));
    };

    const SchedulerBarrier<Traits::kFirstSchedulerBarrier, Traits::kConsumers> scheduler(warpgroup);
    const bool negative = !Traits::kCapped && args.score.scale < 0;
    const auto cap = [&](auto& scores) {
        CUTE_UNROLL
        for (int i = 0; i < size(scores); ++i) {
            scores(i) = tanh_of_log2(scores(i) * args.score.tanh_factor);
        }
    };
    WorkReader<Traits> reader(args, shared);
    RingPosition<1> q_at;
    RingPosition<kStages> k_at, v_at;
    ForwardWork work;
    while (reader.next(work)) {
        auto output = partition_fragment_C(output_mma, TileShape<kBlockM, kValueDim>{});
        ForwardSoftmax softmax(args.score);
        if (work.n_begin < work.n_end) {
            const ForwardMask<Traits> mask(args, work, warpgroup);
            const auto hide = [&](auto& scores, int n_tile) {
                if (negative) {
                    CUTE_UNROLL
                    for (int i = 0; i < size(scores); ++i) scores(i) = -scores(i);
                }
                mask.apply(scores, n_tile);
            };
            auto scores = partition_fragment_C(score_mma, TileShape<kBlockM, kBlockN>{});
            shared.q_full.wait(q_at.parity);
            shared.k_full[k_at.stage].wait(k_at.parity);
            start_mma<false>(score_mma, q_operand, k_operand(k_at.stage), scores);
            wait_mmas<0>();
            shared.k_empty[k_at.stage].arrive_warp();
            k_at.advance();
            if constexpr (Traits::kCapped) cap(scores);
            hide(scores, work.n_end - 1);
            softmax.template update<kBlockN, true>(scores);
            auto probabilities = round_to<Element>(scores);
            clear(output);

            // Scores of tile n, while the output of tile n + 1 is computed.
            const auto step =
                [&]<bool kMasked>(int n_tile, std::bool_constant<kMasked>)
                    __attribute__((always_inline)) {
                        shared.k_full[k_at.stage].wait(k_at.parity);
                        scheduler.wait();
                        start_mma<false>(score_mma, q_operand, k_operand(k_at.stage), scores);
                        shared.v_full[v_at.stage].wait(v_at.parity);
                        start_mma<true>(output_mma, as_register_operand<kBlockN>(probabilities),
                                        v_operand(v_at.stage), output);
                        scheduler.let_next();
                        wait_mmas<1>();
                        shared.k_empty[k_at.stage].arrive_warp();
                        k_at.advance();
                        if constexpr (Traits::kCapped) cap(scores);
                        if constexpr (kMasked) hide(scores, n_tile);
                        const float2 factors = softmax.template update<kBlockN, kMasked>(scores);
                        finish_before_waiting(softmax.sum, shared);
                        wait_mmas<0>();
                        shared.v_empty[v_at.stage].arrive_warp();
                        v_at.advance();
                        probabilities = round_to<Element>(scores);
                        if (__any_sync(0xffffffffu, factors.x != 1.0f || factors.y != 1.0f)) {
                            scale_rows<kValueDim>(output, factors);
                        }
                    };
            // From the last tile down: some that not all queries see, those seen whole, and, with
            // windows or groups, again some that not all see.
            const int all_begin = max(mask.n_all_begin, work.n_begin);
            const int all_end = negative ? work.n_begin : mask.n_all_end;
            int n_tile = work.n_end - 2;
            for (; n_tile >= max(all_end, work.n_begin); --n_tile) step(n_tile, std::true_type{});
            for (; n_tile >= all_begin; --n_tile) step(n_tile, std::false_type{});
            for (; n_tile >= work.n_begin; --n_tile) step(n_tile, std::true_type{});

            if constexpr (!Traits::kOutputInQ) shared.q_empty.arrive_warp();
            q_at.advance();
            shared.v_full[v_at.stage].wait(v_at.parity);
            start_mma<true>(output_mma, as_register_operand<kBlockN>(probabilities),
                            v_operand(v_at.stage), output);
            softmax.finish();
            wait_mmas<0>();
            shared.v_empty[v_at.stage].arrive_warp();
            v_at.advance();
        } else {
            clear(output);
        }

        store_output(args, shared, work, warpgroup, softmax, output);
    }
    scheduler.finish();
}

}  // namespace lemo::cuda::segment_attention::hopper
