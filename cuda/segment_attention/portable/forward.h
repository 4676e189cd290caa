// The forward kernel, portable tier: one thread block for each tile of queries and head.
//
// Keys and values pass through one shared-memory buffer each. While the scores of a tile are
// computed its values arrive, and while those are multiplied the next keys do; two thread blocks
// share a multiprocessor, so that the softmax of one overlaps with the mma of the other.
#pragma once

#include <cmath>

#include "common/async_copy.h"
#include "common/exp2.h"
#include "common/launch.h"
#include "segment_attention/portable/kernels.h"
#include "segment_attention/portable/score_tile.h"
#include "segment_attention/row_end.h"

namespace lemo::cuda::segment_attention::portable {

/// Tiles of the forward kernel.
template <typename Element_, int kHeadDim_, int kValueDim_, bool kCapped_>
struct ForwardTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kValueDim = kValueDim_;
    static constexpr bool kCapped = kCapped_;
    // 32 query rows for each warp: a fragment of keys or values serves two row tiles. With the
    // largest values the output of 16 rows takes as many registers.
    static constexpr int kNumWarps = 4;
    static constexpr int kBlockM = (kValueDim == 256 ? 16 : 32) * kNumWarps;
    // As many keys as leave registers for scores and output: 128 + 64, or 64 + 128 a thread.
    static constexpr int kBlockN = kHeadDim == 64 ? 128 : 64;
    static constexpr int kThreads = 32 * kNumWarps;

    using TiledMma = cute::TiledMMA<MmaAtom<Element>, Layout<Shape<cute::Int<kNumWarps>, _1, _1>>,
                                    cute::Tile<cute::Int<16 * kNumWarps>, _16, _16>>;
    using LayoutQ = SmemLayout<kBlockM, kHeadDim>;
    using LayoutK = SmemLayout<kBlockN, kHeadDim>;
    using LayoutV = SmemLayout<kBlockN, kValueDim>;
    // In the place of Q. Columns lie in the same places, 64 at a time.
    using LayoutO = SmemLayout<kBlockM, kValueDim>;
    static_assert(kValueDim <= kHeadDim, "the output fits into the place of Q");

    static constexpr int kSharedBytes =
        ((kBlockM + kBlockN) * kHeadDim + kBlockN * kValueDim) * static_cast<int>(sizeof(Element));
};

struct ForwardArguments {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    float* lse;
    AttentionPlan plan;
    int num_heads;
    int num_kv_heads;
    int head_dim;
    int value_dim;
    ScoreSettings score;
};

/// Running maximum and sum of the exponentials of the rows that a thread holds a part of.
template <int kRows>
struct OnlineSoftmax {
    float max[kRows];
    float sum[kRows];

    __device__ OnlineSoftmax() {
        CUTE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            max[r] = -INFINITY;
            sum[r] = 0;
        }
    }

    /// Turns scores into exp2(scale * score - scale * max) and rescales what was summed so far.
    template <typename Scores, typename Output>
    __device__ __forceinline__ void update(Scores& scores, Output& output, float scale_log2) {
        CUTE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float highest = scores(r, 0);
            CUTE_UNROLL
            for (int c = 1; c < cute::size<1>(scores); ++c) {
                highest = fmaxf(highest, scores(r, c));
            }
            // The four lanes of a quad hold one row.
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            highest = fmaxf(max[r], highest);
            // A row that has seen no key yet subtracts 0: -inf - (-inf) would be NaN.
            const float shift = highest == -INFINITY ? 0.0f : highest * scale_log2;
            const float factor = exp2_approximate(max[r] * scale_log2 - shift);
            max[r] = highest;
            float total = 0;
            CUTE_UNROLL
            for (int c = 0; c < cute::size<1>(scores); ++c) {
                scores(r, c) = exp2_approximate(fmaf(scores(r, c), scale_log2, -shift));
                total += scores(r, c);
            }
            sum[r] = fmaf(sum[r], factor, total);
            CUTE_UNROLL
            for (int c = 0; c < cute::size<1>(output); ++c) output(r, c) *= factor;
        }
    }

    /// Adds up the parts of a row that lie in different lanes.
    __device__ __forceinline__ void finish() {
        CUTE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        }
    }
};

/// Grid: heads, query tiles from the last, which see the most keys: blocks that run together read
/// the same few keys, and the short ones fill the end.
template <typename Traits>
__global__ void
__launch_bounds__(Traits::kThreads, 2)
portable_forward_kernel(const __grid_constant__ ForwardArguments args) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim, kValueDim = Traits::kValueDim;
    constexpr int kThreads = Traits::kThreads;

    SequenceTile tile;
    const auto [head, place] = HeadAndTile(args.num_heads);
    const int reversed = args.plan.max_q_tiles - 1 - place;
    if (!find_tile(args.plan, args.plan.cu_q_tiles, args.plan.cu_q, kBlockM, reversed, tile)) {
        return;
    }
    const int kv_head = head / (args.num_heads / args.num_kv_heads);
    // Rows of keys and queries, and of values and output where those have a size of their own.
    constexpr bool kOne = kOneSize<kHeadDim>;
    const int value_dim = kOne ? args.head_dim : args.value_dim;
    const int64_t q_stride = int64_t{args.num_heads} * args.head_dim;
    const int64_t k_stride = int64_t{args.num_kv_heads} * args.head_dim;
    const int64_t out_stride = kOne ? q_stride : int64_t{args.num_heads} * value_dim;
    const int64_t v_stride = kOne ? k_stride : int64_t{args.num_kv_heads} * value_dim;
    const int m_first = tile.tile * kBlockM;
    const int rows_left = tile.num_q - m_first;
    const int64_t first_query = int64_t{tile.q_first} + m_first;
    const int64_t q_offset = first_query * q_stride + int64_t{head} * args.head_dim;
    const int64_t out_offset =
        kOne ? q_offset : first_query * out_stride + int64_t{head} * value_dim;
    const int64_t k_offset =
        int64_t{tile.k_first} * k_stride + int64_t{kv_head} * args.head_dim;
    const int64_t v_offset =
        kOne ? k_offset : int64_t{tile.k_first} * v_stride + int64_t{kv_head} * value_dim;
    const auto key_rows = [&](int n_tile) {
        const auto* first = static_cast<const Element*>(args.k) + k_offset;
        const int row = n_tile * kBlockN;
        return GlobalRows<const Element>{first + row * k_stride, k_stride, tile.num_k - row,
                                         args.head_dim};
    };
    const auto value_rows = [&](int n_tile) {
        const auto* first = static_cast<const Element*>(args.v) + v_offset;
        const int row = n_tile * kBlockN;
        return GlobalRows<const Element>{first + row * v_stride, v_stride, tile.num_k - row,
                                         value_dim};
    };

    // Keys that some query of the tile sees, and those that all of them see.
    const VisibleKeys visible(args.plan, tile, head, args.num_heads);
    const int2 seen_by_first = visible(m_first);
    const int2 seen_by_last = visible(m_first + kBlockM - 1);
    const int n_begin = seen_by_first.x / kBlockN;
    const int n_end = ceil_div(seen_by_last.y, kBlockN);

    extern __shared__ __align__(128) std::byte shared_bytes[];
    auto* shared = reinterpret_cast<Element*>(shared_bytes);
    auto sQ = make_tensor(make_smem_ptr(shared), typename Traits::LayoutQ{});
    auto sK = make_tensor(sQ.data() + size(sQ), typename Traits::LayoutK{});
    auto sV = make_tensor(sK.data() + size(sK), typename Traits::LayoutV{});
    auto sO = make_tensor(sQ.data(), typename Traits::LayoutO{});

    typename Traits::TiledMma tiled_mma;
    auto out = partition_fragment_C(tiled_mma, TileShape<kBlockM, kValueDim>{});
    clear(out);
    auto out_rows = by_row_and_column(out);
    const auto where = accumulator_places<kBlockM, kBlockN>(tiled_mma);
    constexpr int kRows = decltype(size<0>(out_rows))::value;
    OnlineSoftmax<kRows> softmax;

    const bool negative = args.score.scale < 0;
    // A scale of 0 would make NaN of masked scores; the smallest number does the same otherwise.
    const float scale_log2 = fmaxf(args.score.softmax_scale * float(M_LOG2E), 1.2e-38f);

    if (n_begin < n_end) {
        const GlobalRows<const Element> q_rows{static_cast<const Element*>(args.q) + q_offset,
                                               q_stride, rows_left, args.head_dim};
        load_tile_async<kThreads, kBlockM, kHeadDim>(q_rows, sQ);
        load_tile_async<kThreads, kBlockN, kHeadDim>(key_rows(n_end - 1), sK);
        commit_copies();
    }
    for (int n_tile = n_end - 1; n_tile >= n_begin; --n_tile) {
        wait_copies<0>();
        __syncthreads();  // keys are there; all are done with the values before
        load_tile_async<kThreads, kBlockN, kValueDim>(value_rows(n_tile), sV);
        commit_copies();

        auto scores = partition_fragment_C(tiled_mma, TileShape<kBlockM, kBlockN>{});
        clear(scores);
        tile_mma(tiled_mma, left_operand(LoadFragment<Element>{}, tiled_mma, sQ),
                 right_operand(LoadFragment<Element>{}, tiled_mma, sK), scores);

        auto score_rows = by_row_and_column(scores);
        if constexpr (Traits::kCapped) {
            take_tanh(scores, args.score.tanh_factor);
        } else if (negative) {
            CUTE_UNROLL
            for (int i = 0; i < size(scores); ++i) scores(i) = -scores(i);
        }
        const int n_first = n_tile * kBlockN;
        if (n_first < seen_by_last.x || n_first + kBlockN > seen_by_first.y) {
            hide_unseen(score_rows, where, visible, m_first, n_first, -INFINITY);
        }

        wait_copies<0>();
        __syncthreads();  // values are there; all are done with the keys
        if (n_tile > n_begin) {
            load_tile_async<kThreads, kBlockN, kHeadDim>(
                key_rows(n_tile - 1), sK);
            commit_copies();
        }
        softmax.update(score_rows, out_rows, scale_log2);
        const auto probabilities = round_to<Element>(scores);
        register_mma(tiled_mma, as_left_operand(probabilities),
                     right_operand(LoadFragmentTransposed<Element>{}, tiled_mma, transposed(sV)),
                     out);
    }

    softmax.finish();
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
        const RowEnd end(softmax.max[r] * args.score.softmax_scale, softmax.sum[r],
                         args.score.sinks, head);
        CUTE_UNROLL
        for (int c = 0; c < size<1>(out_rows); ++c) out_rows(r, c) *= end.factor;
        const int row = get<0>(where(r, _0{}));
        if (get<1>(where(r, _0{})) == 0 && row < rows_left) {
            args.lse[int64_t{head} * args.plan.num_queries + tile.q_first + m_first + row] =
                end.log_sum;
        }
    }
    // A warp's rows of sQ are read by that warp alone, so no barrier before they are overwritten.
    const auto rounded = round_to<Element>(out);
    store_accumulators<Element>(tiled_mma, rounded, sO);
    __syncthreads();
    store_tile<kThreads, kBlockM, kValueDim>(
        sO, GlobalRows<Element>{static_cast<Element*>(args.out) + out_offset, out_stride, rows_left,
                                value_dim});
}

template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
int64_t ForwardPass<Element, kHeadDim, kValueDim, kCapped>::scratch_bytes(
    const SegmentAttentionParams& params) {
    return count_scratch_bytes<PlanScratch>(params);
}

template <typename Element, int kHeadDim, int kValueDim, bool kCapped>
void ForwardPass<Element, kHeadDim, kValueDim, kCapped>::launch(
    const SegmentAttentionParams& params, cudaStream_t stream) {
    using Traits = ForwardTraits<Element, kHeadDim, kValueDim, kCapped>;
    Arena arena(params.scratch);
    const PlanScratch scratch(params, arena);
    ForwardArguments args{};
    args.q = params.q.data;
    args.k = params.k.data;
    args.v = params.v.data;
    args.out = params.out.data;
    args.lse = params.lse.as<float>();
    args.plan = make_plan(params, Traits::kBlockM, Traits::kBlockN, scratch, stream);
    args.num_heads = static_cast<int>(params.q.size(1));
    args.num_kv_heads = static_cast<int>(params.k.size(1));
    args.head_dim = static_cast<int>(params.q.size(2));
    args.value_dim = static_cast<int>(params.v.size(2));
    args.score = ScoreSettings(params);
    auto* kernel = portable_forward_kernel<Traits>;
    reserve_shared_memory("segment_attention", kernel, Traits::kSharedBytes);
    const unsigned grid =
        grid_x("segment_attention", "q", int64_t{args.num_heads} * args.plan.max_q_tiles);
    kernel<<<grid, Traits::kThreads, Traits::kSharedBytes, stream>>>(args);
    check_launch("segment_attention");
}

}  // namespace lemo::cuda::segment_attention::portable
