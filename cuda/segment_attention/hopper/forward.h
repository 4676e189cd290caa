// The forward attention kernel for compute capability 9.0.
//
// One thread block stays on each multiprocessor and works on one tile of queries after another. A
// producer warp copies queries, keys and values; each consumer warpgroup has 64 of the queries. A
// consumer starts the scores of the next tile of keys and then the product of the last one's
// probabilities with their values, and computes the softmax of the one while the other runs. The
// warpgroups take turns to start products, so that the softmax of one falls beneath the products of
// the others.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "segment_attention/hopper/forward_softmax.h"
#include "segment_attention/hopper/kernels.h"
#include "segment_attention/hopper/load_tile.h"
#include "segment_attention/hopper/store_rows.h"
#include "segment_attention/hopper/turns.h"

namespace lemo::cuda::hopper {

template <typename Traits>
__device__ void init_barriers(ForwardShared<Traits>& shared) {
    constexpr int kConsumerThreads = kWarpgroupThreads * Traits::kConsumers;
    constexpr int kConsumerWarps = kConsumerThreads / 32;
    shared.q_full.init(1);
    shared.q_empty.init(kConsumerWarps);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
        shared.k_full[stage].init(1);
        shared.v_full[stage].init(1);
        shared.k_empty[stage].init(kConsumerWarps);
        shared.v_empty[stage].init(kConsumerWarps);
    }
    for (int slot = 0; slot < 2; ++slot) {
        shared.work_full[slot].init(1);
        shared.work_empty[slot].init(kConsumerThreads);
    }
    publish_barriers();
}

/// Run by one thread.
template <typename Traits>
__device__ void produce(const ForwardArguments& args, ForwardShared<Traits>& shared) {
    using Element = typename Traits::Element;
    constexpr int kBlockN = Traits::kBlockN, kHeadDim = Traits::kHeadDim;
    WorkQueue<Traits> queue(args, shared);
    RingPosition<1> q_at;
    RingPosition<Traits::kStages> k_at, v_at;
    ForwardWork work;
    while (queue.next(work)) {
        if (work.n_begin >= work.n_end) continue;
        const auto copy_keys = [&](int n_tile) {
            shared.k_empty[k_at.stage].wait(k_at.parity ^ 1);
            Barrier& full = shared.k_full[k_at.stage];
            full.arrive_expecting(kTileBytes<kBlockN, kHeadDim, Element>);
            copy_tile<kBlockN, kHeadDim>(args.k, full, shared.k[k_at.stage], work.kv_head,
                                         work.tile.k_first + n_tile * kBlockN);
            k_at.advance();
        };
        const auto copy_values = [&](int n_tile) {
            shared.v_empty[v_at.stage].wait(v_at.parity ^ 1);
            Barrier& full = shared.v_full[v_at.stage];
            full.arrive_expecting(kTileBytes<kBlockN, kHeadDim, Element>);
            copy_tile<kBlockN, kHeadDim>(args.v, full, shared.v[v_at.stage], work.kv_head,
                                         work.tile.k_first + n_tile * kBlockN);
            v_at.advance();
        };
        shared.q_empty.wait(q_at.parity ^ 1);
        shared.q_full.arrive_expecting(kTileBytes<Traits::kBlockM, kHeadDim, Element>);
        copy_tile<Traits::kBlockM, kHeadDim>(args.q, shared.q_full, shared.q, work.head,
                                             work.tile.q_first + work.m_first);
        q_at.advance();
        copy_keys(work.n_end - 1);
        for (int n_tile = work.n_end - 1; n_tile >= work.n_begin; --n_tile) {
            if (n_tile > work.n_begin) copy_keys(n_tile - 1);
            copy_values(n_tile);
        }
    }
}

/// The compiler would wait for a product before it computes what is written before the wait, since
/// registers are no memory. A store that depends on the sums and never happens, as they are not
/// negative, keeps the order.
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

template <typename Traits>
__device__ void consume(const ForwardArguments& args, ForwardShared<Traits>& shared,
                        int warpgroup) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim, kStages = Traits::kStages;
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;

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

    const Turns<Traits::kConsumers> turns(warpgroup);
    const bool negative = args.scale < 0;
    WorkReader<Traits> reader(args, shared);
    RingPosition<1> q_at;
    RingPosition<kStages> k_at, v_at;
    ForwardWork work;
    while (reader.next(work)) {
        auto output = partition_fragment_C(output_mma, TileShape<kBlockM, kHeadDim>{});
        ForwardSoftmax softmax(args.scale);
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
            start_product<false>(score_mma, q_operand, k_operand(k_at.stage), scores);
            wait_products<0>();
            shared.k_empty[k_at.stage].arrive_warp();
            k_at.advance();
            hide(scores, work.n_end - 1);
            softmax.template update<kBlockN, true>(scores);
            auto probabilities = round_to<Element>(scores);
            clear(output);

            // Scores of tile n, beneath the output of tile n + 1.
            const auto step = [&]<bool kMasked>(int n_tile, std::bool_constant<kMasked>)
                                  __attribute__((always_inline)) {
                shared.k_full[k_at.stage].wait(k_at.parity);
                turns.wait();
                start_product<false>(score_mma, q_operand, k_operand(k_at.stage), scores);
                shared.v_full[v_at.stage].wait(v_at.parity);
                start_product<true>(output_mma, as_register_operand<kBlockN>(probabilities),
                                    v_operand(v_at.stage), output);
                turns.pass_on();
                wait_products<1>();
                shared.k_empty[k_at.stage].arrive_warp();
                k_at.advance();
                if constexpr (kMasked) hide(scores, n_tile);
                const float2 factors = softmax.template update<kBlockN, kMasked>(scores);
                finish_before_waiting(softmax.sum, shared);
                wait_products<0>();
                shared.v_empty[v_at.stage].arrive_warp();
                v_at.advance();
                probabilities = round_to<Element>(scores);
                if (__any_sync(0xffffffffu, factors.x != 1.0f || factors.y != 1.0f)) {
                    scale_rows<kHeadDim>(output, factors);
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

            shared.q_empty.arrive_warp();
            q_at.advance();
            shared.v_full[v_at.stage].wait(v_at.parity);
            start_product<true>(output_mma, as_register_operand<kBlockN>(probabilities),
                                v_operand(v_at.stage), output);
            softmax.finish();
            wait_products<0>();
            shared.v_empty[v_at.stage].arrive_warp();
            v_at.advance();
        } else {
            clear(output);
        }

        const bool blind[] = {softmax.sum[0] == 0.0f, softmax.sum[1] == 0.0f};
        scale_rows<kHeadDim>(output, make_float2(blind[0] ? 0.0f : 1.0f / softmax.sum[0],
                                                 blind[1] ? 0.0f : 1.0f / softmax.sum[1]));
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
            const int row = work.m_first + warpgroup * 64 + thread_row() + 8 * r;
            if (threadIdx.x % 4 == 0 && row < work.tile.num_q) {
                args.lse[int64_t{work.head} * args.plan.num_queries + work.tile.q_first + row] =
                    blind[r] ? -INFINITY
                             : softmax.max[r] * fabsf(args.scale) + logf(softmax.sum[r]);
            }
        }
        const int warp_row = warpgroup * 64 + thread % kWarpgroupThreads / 32 * 16;
        const int64_t row = work.tile.q_first + work.m_first + warp_row;
        const int64_t stride = int64_t{args.num_heads} * args.head_dim;
        store_rows<kHeadDim, Element>(
            output, shared.out + warp_row * kHeadDim,
            {static_cast<Element*>(args.out) + row * stride + int64_t{work.head} * args.head_dim,
             stride, work.tile.num_q - work.m_first - warp_row, args.head_dim});
    }
    turns.finish();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
attention_forward_kernel(const __grid_constant__ ForwardArguments args) {
    extern __shared__ __align__(1024) std::byte shared_bytes[];
    auto& shared = *reinterpret_cast<ForwardShared<Traits>*>(shared_bytes);
    if (threadIdx.x == 0) init_barriers(shared);
    __syncthreads();
    const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x) / kWarpgroupThreads);
    if (warpgroup == 0) {
        cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
        if (threadIdx.x == 0) produce<Traits>(args, shared);
    } else {
        cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
        consume<Traits>(args, shared, warpgroup - 1);
    }
}

/// Key/value heads of a section of the work, of which `head_tiles` tiles of queries read each: as
/// many as the L2 cache holds beside queries and results, and enough for several tiles on each
/// multiprocessor. Sections of one size, since a small last one would leave multiprocessors idle.
inline int section_heads(const Tensor& k, int head_tiles, int multiprocessors) {
    constexpr int64_t kCachedBytes = int64_t{16} << 20;
    constexpr int kTiles = 4;
    constexpr int64_t kElementBytes = 2;
    const int64_t heads = k.size(1);
    const int64_t head_bytes = 2 * k.size(0) * k.size(2) * kElementBytes;  // keys and values
    const int64_t most = std::max<int64_t>({kCachedBytes / std::max<int64_t>(head_bytes, 1),
                                            ceil_div(kTiles * multiprocessors, head_tiles), 1});
    const int64_t sections = ceil_div(heads, std::min(most, heads));
    return static_cast<int>(ceil_div(heads, sections));
}

template <typename Element, int kHeadDim>
void launch_forward(const SegmentAttentionParams& params, cudaStream_t stream) {
    using Traits = ForwardTraits<Element, kHeadDim>;
    constexpr const char* kOp = "segment_attention";
    ForwardArguments args{};
    args.q = make_tensor_map(kOp, params.q, Traits::kBlockM);
    args.k = make_tensor_map(kOp, params.k, Traits::kBlockN);
    args.v = make_tensor_map(kOp, params.v, Traits::kBlockN);
    args.out = params.out.data;
    args.lse = params.lse.as<float>();
    args.next_work = params.scratch.as<int>();
    args.plan = make_plan(params, Traits::kBlockM, Traits::kBlockN,
                          params.scratch.as<std::byte>() + kWorkBytes, stream);
    args.num_heads = static_cast<int>(params.q.size(1));
    args.num_kv_heads = static_cast<int>(params.k.size(1));
    args.head_dim = static_cast<int>(params.q.size(2));
    args.scale = params.scale;
    check_status(kOp, cudaMemsetAsync(args.next_work, 0, sizeof(int), stream));

    auto* kernel = attention_forward_kernel<Traits>;
    constexpr int kSharedBytes = static_cast<int>(sizeof(ForwardShared<Traits>));
    reserve_shared_memory(kOp, kernel, kSharedBytes);
    const int multiprocessors = num_multiprocessors(kOp);
    const int group = args.num_heads / args.num_kv_heads;
    args.heads_at_once =
        group * section_heads(params.k, group * args.plan.max_q_tiles, multiprocessors);
    const int items = args.num_heads * args.plan.max_q_tiles;
    kernel<<<std::min(items, multiprocessors), Traits::kThreads, kSharedBytes, stream>>>(args);
    check_launch(kOp);
}

}  // namespace lemo::cuda::hopper
