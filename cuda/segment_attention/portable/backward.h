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

#include "common/launch.h"
#include "common/vector.h"
#include "segment_attention/portable/backward_products.h"
#include "segment_attention/portable/dq_accumulators.h"
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

/// dk and dv of one tile of keys, and what that adds to dq. Grid: key/value heads, key tiles from
/// the first, which the most queries see.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
portable_backward_kernel(const __grid_constant__ BackwardArguments args) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim, kValueDim = Traits::kValueDim;
    constexpr int kThreads = Traits::kThreads;

    const auto [kv_head, place] = HeadAndTile(args.num_kv_heads);
    SequenceTile tile;
    if (!find_tile(args.plan, args.plan.cu_k_tiles, args.plan.cu_k, kBlockN, place, tile)) return;
    const int group = args.num_heads / args.num_kv_heads;

    extern __shared__ __align__(128) std::byte shared_bytes[];
    const BackwardShared<Traits> shared(shared_bytes);
    const BackwardRows<Traits> rows(args, tile, kv_head, shared);
    const int q_tiles_before =
        args.plan.cu_q_tiles != nullptr ? args.plan.cu_q_tiles[tile.sequence] : 0;
    const int n_first = rows.n_first();
    const BackwardScores<Traits> score_math(args.score);
    const auto where = accumulator_places<kBlockM, kBlockN>(typename Traits::ScoreMma{});

    typename Traits::KeyMma key_mma;
    auto dk = partition_fragment_C(key_mma, TileShape<kBlockN, kHeadDim>{});
    auto dv = partition_fragment_C(key_mma, TileShape<kBlockN, kValueDim>{});
    clear(dk);
    clear(dv);

    const QueryWalk walk(args.plan, tile, kv_head * group, group, args.num_heads, kBlockM,
                         kBlockN);
    QueryStep now = walk.first();
    int buffer = 0;  // which Q, and which dO if there are two, holds the tile of `now`
    // At the tile before: the next block may add once this one's sums have long been written.
    AddOrder order{nullptr};
    if (!walk.done(now)) {
        rows.load_keys_and_values();
        rows.load_queries(now, shared.q(0));
        rows.load_dout(now, shared.dout(0));
        rows.load_statistics(now, 0);
        commit_copies();
    }
    while (!walk.done(now)) {
        QueryStep next = now;
        walk.advance(next);
        const auto q = shared.q(buffer), q_of_next = shared.q(buffer ^ 1);
        const auto dout = shared.dout(buffer), dout_of_next = shared.dout(buffer ^ 1);

        wait_copies<0>();
        order.publish();
        __syncthreads();  // Q and dO are there; all are done with dS and the other buffers
        order.let_next();
        if (!walk.done(next)) {
            rows.load_queries(next, q_of_next);
            rows.load_statistics(next, buffer ^ 1);
            if constexpr (Traits::kBuffersOfdO == 2) rows.load_dout(next, dout_of_next);
            commit_copies();
        }

        // Probabilities, or under a softcap their tanh, of the keys that each query sees.
        const RowStatistics<Traits, decltype(where)> statistics{shared.statistics(), buffer, where};
        auto scores = query_key_products<Traits>(q, shared.k());
        score_math.activate(scores, statistics);
        auto score_rows = by_row_and_column(scores);
        const VisibleKeys visible(args.plan, tile, now.head, args.num_heads);
        const int m_first = now.m_tile * kBlockM;
        const int2 seen_by_first = visible(m_first);
        const int2 seen_by_last = visible(m_first + kBlockM - 1);
        if (n_first < seen_by_last.x || n_first + kBlockN > seen_by_first.y) {
            hide_unseen(score_rows, where, visible, m_first, n_first, score_math.kHidden);
        }

        auto dscores = query_key_products<Traits>(dout, shared.v());
        score_math.differentiate(scores, dscores, statistics);
        typename Traits::ScoreMma score_mma;
        store_accumulators<Element>(score_mma, round_to<Element>(scores), shared.p());
        store_accumulators<Element>(score_mma, round_to<Element>(dscores), shared.ds());
        const int packed_tile = q_tiles_before + now.m_tile;
        if (args.added_tiles != nullptr) {
            order.added_tiles =
                args.added_tiles + int64_t{now.head} * args.plan.max_q_tiles + packed_tile;
            order.wait(tile.tile - seen_by_first.x / kBlockN);
        }
        __syncthreads();  // P and dS are there, and this block may add to dq

        add_key_products<Traits>(shared.p(), dout, dv);
        if constexpr (Traits::kBuffersOfdO == 1) {
            __syncthreads();  // all are done with dO
            if (!walk.done(next)) {
                rows.load_dout(next, dout_of_next);
                commit_copies();
            }
        }

        const auto dq = query_gradient<Traits>(shared.ds(), shared.k());
        // Added in small parts during the last mma: all at once they would hold it up.
        const DqAccumulators<Traits> dq_sums(args, now.head, packed_tile);
        add_key_products<Traits>(shared.ds(), q, dk,
                                 [&](int step, int steps) { dq_sums.add(dq, step, steps); });
        now = next;
        buffer ^= 1;
    }

    CUTE_UNROLL
    for (int i = 0; i < size(dk); ++i) dk(i) *= args.score.scale;
    order.publish();
    __syncthreads();  // all are done with K and V, whose places the results take
    order.let_next();
    store_accumulators<Element>(key_mma, round_to<Element>(dk), shared.k());
    store_accumulators<Element>(key_mma, round_to<Element>(dv), shared.v());
    __syncthreads();
    store_tile<kThreads, kBlockN, kHeadDim>(shared.k(),
                                            rows.like_keys(static_cast<Element*>(args.dk)));
    store_tile<kThreads, kBlockN, kValueDim>(shared.v(),
                                             rows.like_values(static_cast<Element*>(args.dv)));
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
            <<<grid_x(kOp, "q", ceil_div<int64_t>(threads, kStatisticsThreads)),
               kStatisticsThreads, 0, stream>>>(args);
        check_launch(kOp);
    }
    sum_sink_terms(params, args.sink_terms, stream);
    auto* kernel = portable_backward_kernel<Traits>;
    reserve_shared_memory(kOp, kernel, Traits::kSharedBytes);
    const unsigned key_grid =
        grid_x(kOp, "k", int64_t{args.num_kv_heads} * args.plan.max_k_tiles);
    kernel<<<key_grid, Traits::kThreads, Traits::kSharedBytes, stream>>>(args);
    check_launch(kOp);
    const dim3 query_grid(grid_x(kOp, "q", args.plan.max_q_tiles),
                          grid_yz(kOp, "q", args.num_heads));
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
