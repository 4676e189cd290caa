// The backward kernels, portable tier.
//
// The main kernel gives each thread block a tile of keys of one key/value head. It walks over the
// query tiles that see them, of every query head of the group, so the gradients of keys and values
// are summed in registers and written once. Those of the queries come from many blocks: they are
// added in fp32 to scratch whose order suits the accumulators, and a last kernel rounds them. Asked
// to be deterministic, thread blocks add to a query tile in the order of their keys. All walk in
// the same order, so a block follows the one before at a distance of about a tile and seldom waits.
#pragma once

#include <cmath>

#include "common/async_copy.h"
#include "common/exp2.h"
#include "common/launch.h"
#include "common/vector.h"
#include "segment_attention/portable/dq_accumulators.h"
#include "segment_attention/portable/kernels.h"
#include "segment_attention/query_walk.h"
#include "segment_attention/sinks.h"

namespace lemo::cuda::segment_attention::portable {

constexpr int kStatisticsThreads = 256;
/// 16 bytes each.
template <int kValueDim>
constexpr int kLanesPerRow = kValueDim <= 128 ? 16 : 32;

/// What the main kernel reads of every query and head.
template <typename Element, int kLanesPerRow>
__global__ void
__launch_bounds__(kStatisticsThreads)
portable_statistics_kernel(const __grid_constant__ BackwardArguments args) {
    const int64_t item =
        (int64_t{blockIdx.x} * kStatisticsThreads + threadIdx.x) / kLanesPerRow;  // (query, head)
    const int lane = threadIdx.x % kLanesPerRow;
    const int64_t num_items = int64_t{args.plan.num_queries} * args.num_heads;
    float sum = 0;
    if (item < num_items && lane * 8 < args.value_dim) {
        using Vector = cutlass::AlignedArray<Element, 8>;
        const int64_t offset = item * args.value_dim + lane * 8;
        const auto out =
            *reinterpret_cast<const Vector*>(static_cast<const Element*>(args.out) + offset);
        const auto dout =
            *reinterpret_cast<const Vector*>(static_cast<const Element*>(args.dout) + offset);
        CUTE_UNROLL
        for (int i = 0; i < 8; ++i) sum = fmaf(float(out[i]), float(dout[i]), sum);
    }
    CUTE_UNROLL
    for (int offset = kLanesPerRow / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (item < num_items && lane == 0) {
        const int64_t query = item / args.num_heads;
        const int64_t head = item % args.num_heads;
        const int64_t at = head * args.plan.num_queries + query;
        const float log2_sum = args.lse[at] * float(M_LOG2E);
        args.statistics[at] = make_float2(log2_sum, sum);
        if (args.score.sinks != nullptr) {
            args.sink_terms[at] = sink_term(args.score.sinks[head], log2_sum, sum);
        }
    }
}

/// Grid: key/value heads, key tiles from the first, which the most queries see.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
portable_backward_kernel(const __grid_constant__ BackwardArguments args) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim, kValueDim = Traits::kValueDim;
    constexpr int kThreads = Traits::kThreads;

    SequenceTile tile;
    if (!find_tile(args.plan, args.plan.cu_k_tiles, args.plan.cu_k, kBlockN,
                   static_cast<int>(blockIdx.y), tile)) {
        return;
    }
    const int kv_head = blockIdx.x;
    const int group = args.num_heads / args.num_kv_heads;
    // Rows of keys and queries, and of values and output where those have a size of their own.
    constexpr bool kOne = kOneSize<kHeadDim>;
    const int value_dim = kOne ? args.head_dim : args.value_dim;
    const int64_t q_stride = int64_t{args.num_heads} * args.head_dim;
    const int64_t k_stride = int64_t{args.num_kv_heads} * args.head_dim;
    const int64_t out_stride = kOne ? q_stride : int64_t{args.num_heads} * value_dim;
    const int64_t v_stride = kOne ? k_stride : int64_t{args.num_kv_heads} * value_dim;
    const int n_first = tile.tile * kBlockN;
    const int keys_left = tile.num_k - n_first;
    const int64_t first_key = int64_t{tile.k_first} + n_first;
    const int64_t k_offset = first_key * k_stride + int64_t{kv_head} * args.head_dim;
    const int64_t v_offset = kOne ? k_offset : first_key * v_stride + int64_t{kv_head} * value_dim;
    const auto key_rows = [&]<typename T>(T* base) {
        return GlobalRows<T>{base + k_offset, k_stride, keys_left, args.head_dim};
    };
    const auto value_rows = [&]<typename T>(T* base) {
        return GlobalRows<T>{base + v_offset, v_stride, keys_left, value_dim};
    };
    const int q_tiles_before =
        args.plan.cu_q_tiles != nullptr ? args.plan.cu_q_tiles[tile.sequence] : 0;

    extern __shared__ __align__(128) std::byte shared_bytes[];
    auto* shared = reinterpret_cast<Element*>(shared_bytes);
    auto sK = make_tensor(make_smem_ptr(shared), typename Traits::LayoutK{});
    auto sV = make_tensor(sK.data() + size(sK), typename Traits::LayoutV{});
    auto sQ = make_tensor(sV.data() + size(sV), typename Traits::LayoutQ{});  // and a second one
    auto sdO = make_tensor(sQ.data() + 2 * size(sQ), typename Traits::LayoutdO{});
    auto sP = make_tensor(sdO.data() + Traits::kBuffersOfdO * size(sdO),
                          typename Traits::LayoutS{});
    auto sdS = make_tensor(sP.data() + size(sP), typename Traits::LayoutS{});
    const auto sKt = make_tensor(sK.data(), typename Traits::LayoutKTransposed{});
    const auto sPt = make_tensor(sP.data(), typename Traits::LayoutSTransposed{});
    const auto sdSt = make_tensor(sdS.data(), typename Traits::LayoutSTransposed{});

    typename Traits::ScoreMma score_mma;
    typename Traits::KeyMma key_mma;
    typename Traits::QueryMma query_mma;
    const auto where =
        by_row_and_column(score_mma.get_thread_slice(threadIdx.x)
                              .partition_C(make_identity_tensor(
                                  TileShape<kBlockM, kBlockN>{})));
    constexpr int kRows = decltype(size<0>(where))::value;

    auto dk = partition_fragment_C(key_mma, TileShape<kBlockN, kHeadDim>{});
    auto dv = partition_fragment_C(key_mma, TileShape<kBlockN, kValueDim>{});
    clear(dk);
    clear(dv);

    const auto query_rows = [&](const void* base, int64_t stride, int columns,
                                const QueryStep& at) {
        const int row = at.m_tile * kBlockM;
        const int64_t offset = (int64_t{tile.q_first} + row) * stride + int64_t{at.head} * columns;
        return GlobalRows<const Element>{static_cast<const Element*>(base) + offset, stride,
                                         tile.num_q - row, columns};
    };
    const auto load_queries = [&](const QueryStep& at, auto& to) {
        load_tile_async<kThreads, kBlockM, kHeadDim>(
            query_rows(args.q, q_stride, args.head_dim, at), to);
    };
    const auto load_dout = [&](const QueryStep& at, auto& to) {
        load_tile_async<kThreads, kBlockM, kValueDim>(
            query_rows(args.dout, out_stride, value_dim, at), to);
    };
    // By way of shared memory: a load into registers would hold up the first mma, which waits for
    // the same scoreboard. Rows past the end get zeros, and with dO = 0 add nothing.
    auto* statistics = reinterpret_cast<float2*>(&*(sdS.data() + size(sdS)));
    const auto load_statistics = [&](const QueryStep& at, int buffer) {
        if (threadIdx.x >= kBlockM) return;
        const int row = at.m_tile * kBlockM + static_cast<int>(threadIdx.x);
        const int64_t from = int64_t{at.head} * args.plan.num_queries + tile.q_first + row;
        SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint64_t>::copy(
            reinterpret_cast<const uint64_t&>(args.statistics[from]),
            reinterpret_cast<uint64_t&>(statistics[buffer * kBlockM + threadIdx.x]),
            row < tile.num_q);
    };
    constexpr bool kCapped = Traits::kCapped;
    const float scale_log2 =
        (kCapped ? args.score.softmax_scale : args.score.scale) * float(M_LOG2E);

    const QueryWalk walk(args.plan, tile, kv_head * group, group, args.num_heads, kBlockM,
                         kBlockN);
    QueryStep now = walk.first();
    int buffer = 0;      // which Q, and which dO if there are two, holds the tile of `now`
    // At the tile before: the next block may add once this one's sums have long been written.
    AddOrder order{nullptr};
    if (!walk.done(now)) {
        load_tile_async<kThreads, kBlockN, kHeadDim>(
            key_rows(static_cast<const Element*>(args.k)), sK);
        load_tile_async<kThreads, kBlockN, kValueDim>(
            value_rows(static_cast<const Element*>(args.v)), sV);
        load_queries(now, sQ);
        load_dout(now, sdO);
        load_statistics(now, 0);
        commit_copies();
    }
    while (!walk.done(now)) {
        QueryStep next = now;
        walk.advance(next);
        const auto buffer_of = [&](const auto& first, int index) {
            return make_tensor(first.data() + index * size(first), first.layout());
        };
        const auto sQ_now = buffer_of(sQ, buffer);
        const auto sdO_now = buffer_of(sdO, Traits::kBuffersOfdO == 2 ? buffer : 0);
        auto sQ_next = buffer_of(sQ, buffer ^ 1);
        auto sdO_next = buffer_of(sdO, Traits::kBuffersOfdO == 2 ? buffer ^ 1 : 0);

        wait_copies<0>();
        order.publish();
        __syncthreads();  // Q and dO are there; all are done with dS and the other buffers
        order.let_next();
        if (!walk.done(next)) {
            load_queries(next, sQ_next);
            load_statistics(next, buffer ^ 1);
            if constexpr (Traits::kBuffersOfdO == 2) load_dout(next, sdO_next);
            commit_copies();
        }
        const auto statistics_of = [&](int r) {
            return statistics[buffer * kBlockM + get<0>(where(r, _0{}))];
        };

        auto scores = partition_fragment_C(score_mma, TileShape<kBlockM, kBlockN>{});
        clear(scores);
        tile_mma(score_mma, left_operand(LoadFragment<Element>{}, score_mma, sQ_now),
                 right_operand(LoadFragment<Element>{}, score_mma, sK), scores);
        auto score_rows = by_row_and_column(scores);
        // Below a softcap the tanh, of which a slope is made later; else probabilities.
        if constexpr (kCapped) {
            CUTE_UNROLL
            for (int i = 0; i < size(scores); ++i) {
                scores(i) = tanh_of_log2(scores(i) * args.score.tanh_factor);
            }
        } else {
            CUTE_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const float log_sum = statistics_of(r).x;
                CUTE_UNROLL
                for (int c = 0; c < size<1>(score_rows); ++c) {
                    score_rows(r, c) =
                        exp2_approximate(fmaf(score_rows(r, c), scale_log2, -log_sum));
                }
            }
        }
        const VisibleKeys visible(args.plan, tile, now.head, args.num_heads);
        const int m_first = now.m_tile * kBlockM;
        const int2 seen_by_first = visible(m_first);
        const int2 seen_by_last = visible(m_first + kBlockM - 1);
        if (n_first < seen_by_last.x || n_first + kBlockN > seen_by_first.y) {
            const float hidden = kCapped ? kHiddenTanh : 0.0f;
            CUTE_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const int2 seen = visible(m_first + get<0>(where(r, _0{})));
                CUTE_UNROLL
                for (int c = 0; c < size<1>(score_rows); ++c) {
                    const int key = n_first + get<1>(where(r, c));
                    if (key < seen.x || key >= seen.y) score_rows(r, c) = hidden;
                }
            }
        }

        auto dscores = partition_fragment_C(score_mma, TileShape<kBlockM, kBlockN>{});
        clear(dscores);
        tile_mma(score_mma, left_operand(LoadFragment<Element>{}, score_mma, sdO_now),
                 right_operand(LoadFragment<Element>{}, score_mma, sV), dscores);
        auto dscore_rows = by_row_and_column(dscores);
        CUTE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const float delta = statistics_of(r).y;
            if constexpr (kCapped) {
                const float log_sum = statistics_of(r).x;
                CUTE_UNROLL
                for (int c = 0; c < size<1>(dscore_rows); ++c) {
                    const float tanh = score_rows(r, c);
                    const float probability =
                        tanh == kHiddenTanh
                            ? 0.0f
                            : exp2_approximate(fmaf(tanh, scale_log2, -log_sum));
                    score_rows(r, c) = probability;
                    dscore_rows(r, c) =
                        probability * (dscore_rows(r, c) - delta) * fmaf(-tanh, tanh, 1.0f);
                }
            } else {
                CUTE_UNROLL
                for (int c = 0; c < size<1>(dscore_rows); ++c) {
                    dscore_rows(r, c) = score_rows(r, c) * (dscore_rows(r, c) - delta);
                }
            }
        }
        store_accumulators<Element>(score_mma, round_to<Element>(scores), sP);
        store_accumulators<Element>(score_mma, round_to<Element>(dscores), sdS);
        const int packed_tile = q_tiles_before + now.m_tile;
        if (args.added_tiles != nullptr) {
            order.added_tiles =
                args.added_tiles + int64_t{now.head} * args.plan.max_q_tiles + packed_tile;
            order.wait(tile.tile - seen_by_first.x / kBlockN);
        }
        __syncthreads();  // P and dS are there, and this block may add to dq

        const auto sdOt_now = make_tensor(sdO_now.data(), typename Traits::LayoutdOTransposed{});
        tile_mma(key_mma, left_operand(LoadFragmentTransposed<Element>{}, key_mma, sPt),
                 right_operand(LoadFragmentTransposed<Element>{}, key_mma, sdOt_now), dv);
        if constexpr (Traits::kBuffersOfdO == 1) {
            __syncthreads();  // all are done with dO
            if (!walk.done(next)) {
                load_dout(next, sdO_next);
                commit_copies();
            }
        }

        auto dq = partition_fragment_C(query_mma, TileShape<kBlockM, kHeadDim>{});
        clear(dq);
        tile_mma(query_mma, left_operand(LoadFragment<Element>{}, query_mma, sdS),
                 right_operand(LoadFragmentTransposed<Element>{}, query_mma, sKt), dq);

        // Added in small parts during the last mma: all at once they would hold it up.
        const DqAccumulators<Traits> dq_sums(args, now.head, packed_tile);
        const auto sQt_now = make_tensor(sQ_now.data(), typename Traits::LayoutQTransposed{});
        tile_mma(key_mma, left_operand(LoadFragmentTransposed<Element>{}, key_mma, sdSt),
                 right_operand(LoadFragmentTransposed<Element>{}, key_mma, sQt_now), dk,
                 [&](int step, int steps) { dq_sums.add(dq, step, steps); });
        now = next;
        buffer ^= 1;
    }

    CUTE_UNROLL
    for (int i = 0; i < size(dk); ++i) dk(i) *= args.score.scale;
    order.publish();
    __syncthreads();  // all are done with K and V, whose places the results take
    order.let_next();
    store_accumulators<Element>(key_mma, round_to<Element>(dk), sK);
    store_accumulators<Element>(key_mma, round_to<Element>(dv), sV);
    __syncthreads();
    store_tile<kThreads, kBlockN, kHeadDim>(
        sK, key_rows(static_cast<Element*>(args.dk)));
    store_tile<kThreads, kBlockN, kValueDim>(
        sV, value_rows(static_cast<Element*>(args.dv)));
}

/// Rounds the sums of dq. Grid: query tiles, heads.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
portable_dq_kernel(const __grid_constant__ BackwardArguments args) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kHeadDim = Traits::kHeadDim;

    SequenceTile tile;
    if (!find_tile(args.plan, args.plan.cu_q_tiles, args.plan.cu_q, kBlockM,
                   static_cast<int>(blockIdx.x), tile)) {
        return;
    }
    const int head = blockIdx.y;
    typename Traits::QueryMma query_mma;
    auto dq = partition_fragment_C(query_mma, TileShape<kBlockM, kHeadDim>{});
    DqAccumulators<Traits>(args, head, static_cast<int>(blockIdx.x)).read(dq);
    CUTE_UNROLL
    for (int i = 0; i < size(dq); ++i) dq(i) *= args.score.scale;

    __shared__ __align__(128) Element shared[kBlockM * kHeadDim];
    auto sdQ = make_tensor(make_smem_ptr(shared), typename Traits::LayoutQ{});
    store_accumulators<Element>(query_mma, round_to<Element>(dq), sdQ);
    __syncthreads();
    const int64_t stride = int64_t{args.num_heads} * args.head_dim;
    const int row = tile.tile * kBlockM;
    const int64_t offset =
        (int64_t{tile.q_first} + row) * stride + int64_t{head} * args.head_dim;
    store_tile<Traits::kThreads, kBlockM, kHeadDim>(
        sdQ, GlobalRows<Element>{static_cast<Element*>(args.dq) + offset, stride,
                                 tile.num_q - row, args.head_dim});
}

template <typename Traits>
void launch_backward_kernels(const SegmentAttentionBackwardParams& params, cudaStream_t stream) {
    constexpr const char* kOp = "segment_attention_backward";
    const SegmentAttentionParams& p = params.forward;
    Arena arena(params.scratch);
    const BackwardScratch<Traits> scratch(params, arena);
    BackwardArguments args{};
    args.q = p.q.data;
    args.k = p.k.data;
    args.v = p.v.data;
    args.out = p.out.data;
    args.dout = params.dout.data;
    args.lse = p.lse.as<const float>();
    args.dq = params.dq.data;
    args.dk = params.dk.data;
    args.dv = params.dv.data;
    args.statistics = scratch.statistics;
    args.dq_sums = scratch.dq_sums;
    if (params.deterministic) args.added_tiles = scratch.added_tiles;
    args.plan = make_plan(p, Traits::kBlockM, Traits::kBlockN, scratch.plan, stream);
    args.num_heads = static_cast<int>(p.q.size(1));
    args.num_kv_heads = static_cast<int>(p.k.size(1));
    args.head_dim = static_cast<int>(p.q.size(2));
    args.value_dim = static_cast<int>(p.v.size(2));
    args.score = ScoreSettings(p);
    args.sink_terms = scratch.sink_terms;

    check_status(kOp, cudaMemsetAsync(scratch.dq_sums, 0, scratch.cleared_bytes, stream));
    constexpr int kLanes = kLanesPerRow<Traits::kValueDim>;
    const int64_t threads = p.q.size(0) * p.q.size(1) * kLanes;
    if (threads > 0) {
        portable_statistics_kernel<typename Traits::Element, kLanes>
            <<<static_cast<unsigned>(ceil_div<int64_t>(threads, kStatisticsThreads)),
               kStatisticsThreads, 0, stream>>>(args);
        check_launch(kOp);
    }
    sum_sink_terms(params, args.sink_terms, stream);
    auto* kernel = portable_backward_kernel<Traits>;
    reserve_shared_memory(kOp, kernel, Traits::kSharedBytes);
    const dim3 key_grid(static_cast<unsigned>(args.num_kv_heads),
                        static_cast<unsigned>(args.plan.max_k_tiles));
    kernel<<<key_grid, Traits::kThreads, Traits::kSharedBytes, stream>>>(args);
    check_launch(kOp);
    const dim3 query_grid(static_cast<unsigned>(args.plan.max_q_tiles),
                          static_cast<unsigned>(args.num_heads));
    portable_dq_kernel<Traits><<<query_grid, Traits::kThreads, 0, stream>>>(args);
    check_launch(kOp);
}

/// Calls `body(Traits{})` with the tiles asked for.
template <typename Element, int kHeadDim, int kValueDim, bool kCapped, typename Body>
auto with_tiles(bool small, Body&& body) {
    if constexpr (has_small_tiles(kHeadDim, kCapped)) {
        if (small) {
            return body(BackwardTraits<Element, kHeadDim, kValueDim, kCapped, TileSize::kSmall>{});
        }
    }
    return body(BackwardTraits<Element, kHeadDim, kValueDim, kCapped, TileSize::kLarge>{});
}

template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
int64_t BackwardPass<Element, kHeadDim, kValueDim, kCapped>::scratch_bytes(
    const SegmentAttentionBackwardParams& params, bool small) {
    return with_tiles<Element, kHeadDim, kValueDim, kCapped>(small, [&]<typename Traits>(Traits) {
        return count_scratch_bytes<BackwardScratch<Traits>>(params);
    });
}

template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
void BackwardPass<Element, kHeadDim, kValueDim, kCapped>::launch(
    const SegmentAttentionBackwardParams& params, bool small, cudaStream_t stream) {
    with_tiles<Element, kHeadDim, kValueDim, kCapped>(small, [&]<typename Traits>(Traits) {
        launch_backward_kernels<Traits>(params, stream);
    });
}

}  // namespace lemo::cuda::segment_attention::portable
