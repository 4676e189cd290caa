// The backward attention kernels, portable tier.
//
// The main kernel gives each thread block a tile of keys of one key/value head. It walks over the
// query tiles that see them, for every query head of the group in turn, so the gradients of keys
// and values are summed in registers and written once. Those of the queries come from many blocks:
// they are added in fp32 to scratch whose order suits the accumulators, and a last kernel rounds
// them. Asked to be deterministic, blocks take turns at a query tile, in the order of the keys.
#pragma once

#include <cmath>

#include "common/launch.h"
#include "common/vector.h"
#include "segment_attention/kernels.h"
#include "segment_attention/plan.h"
#include "segment_attention/tile_ops.h"

namespace lemo::cuda {

/// Tiles of the backward kernel. GPUs differ in shared memory: 8.0 and 9.0 have more than 144 KiB a
/// block, 8.6 and 8.9 have 99 KiB.
enum class BackwardTiles { kLarge, kSmall };

template <typename Element_, int kHeadDim_, BackwardTiles kTiles>
struct BackwardTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr bool kLarge = kTiles == BackwardTiles::kLarge;
    // The gradients of keys and values live in registers: 2 * kBlockN * kHeadDim / 256 a thread.
    static constexpr int kBlockM = kHeadDim == 64 && kLarge ? 128 : 64;
    static constexpr int kBlockN = kHeadDim == 64 || kLarge ? 128 : 64;
    static constexpr int kNumWarps = 8;
    static constexpr int kThreads = 32 * kNumWarps;
    // Warps along the rows of each product, so that the piece of a warp is about square: it then
    // reads the least shared memory for its products.
    static constexpr int kScoreWarps = kBlockM == kBlockN ? 4 : 2;
    static constexpr int kKeyWarps = kHeadDim == 64 || kLarge ? 4 : 2;
    static constexpr int kQueryWarps = kHeadDim == 64 && kLarge ? 4 : 2;

    template <int kRowWarps>
    using TiledMmaOf =
        cute::TiledMMA<MmaAtom<Element>,
                       Layout<Shape<cute::Int<kRowWarps>, cute::Int<kNumWarps / kRowWarps>, _1>>,
                       cute::Tile<cute::Int<16 * kRowWarps>,
                                  cute::Int<16 * kNumWarps / kRowWarps>, _16>>;
    using ScoreMma = TiledMmaOf<kScoreWarps>;  // [kBlockM, kBlockN]: scores and their gradient
    using KeyMma = TiledMmaOf<kKeyWarps>;      // [kBlockN, kHeadDim]: dk and dv
    using QueryMma = TiledMmaOf<kQueryWarps>;  // [kBlockM, kHeadDim]: dq

    using LayoutQ = SmemLayout<kBlockM, kHeadDim>;
    using LayoutQTransposed = SmemLayoutTransposed<kBlockM, kHeadDim>;
    using LayoutK = SmemLayout<kBlockN, kHeadDim>;
    using LayoutKTransposed = SmemLayoutTransposed<kBlockN, kHeadDim>;
    using LayoutS = SmemLayout<kBlockM, kBlockN>;
    using LayoutSTransposed = SmemLayoutTransposed<kBlockM, kBlockN>;

    // K, V, two Q, dO, P, dS.
    static constexpr int kSharedBytes =
        (2 * kBlockN * kHeadDim + 3 * kBlockM * kHeadDim + 2 * kBlockM * kBlockN) *
        static_cast<int>(sizeof(Element));
    /// fp32 sums of dq that a thread holds for one query tile.
    static constexpr int kSumsPerThread = kBlockM * kHeadDim / kThreads;
};

struct BackwardArguments {
    const void* q;
    const void* k;
    const void* v;
    const void* out;
    const void* dout;
    const float* lse;
    void* dq;
    void* dk;
    void* dv;
    float* delta;    // [heads, queries]: the sum of out * dout over a row
    float* dq_sums;  // [heads, query tiles, kBlockM * kHeadDim], in the order of DqSums
    int* turns;      // [heads, query tiles], finished key tiles; null: in any order
    AttentionPlan plan;
    int num_heads;
    int num_kv_heads;
    int head_dim;
    float scale;
};

/// Where the accumulators of a query tile lie in scratch. Neighbouring threads are neighbours in
/// memory, so a warp adds whole sectors; compute capability 9.0 adds four floats at once.
template <typename Traits>
struct DqSums {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    static constexpr int kVector = 4;
#else
    static constexpr int kVector = 1;
#endif
    float* first;

    __device__ DqSums(const BackwardArguments& args, int head, int packed_tile)
        : first(args.dq_sums + (int64_t{head} * args.plan.max_q_tiles + packed_tile) *
                                   Traits::kBlockM * Traits::kHeadDim) {}

    template <typename Accumulators>
    __device__ __forceinline__ void add(const Accumulators& sums) const {
        CUTE_UNROLL
        for (int i = 0; i < Traits::kSumsPerThread; i += kVector) {
            float* to = first + i * Traits::kThreads + threadIdx.x * kVector;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
            // atomicAdd of a float4 would also fetch what was there.
            asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to),
                         "f"(sums(i)), "f"(sums(i + 1)), "f"(sums(i + 2)), "f"(sums(i + 3))
                         : "memory");
#else
            atomicAdd(to, sums(i));
#endif
        }
    }

    template <typename Accumulators>
    __device__ __forceinline__ void read(Accumulators& sums) const {
        CUTE_UNROLL
        for (int i = 0; i < Traits::kSumsPerThread; i += kVector) {
            const float* from = first + i * Traits::kThreads + threadIdx.x * kVector;
            CUTE_UNROLL
            for (int j = 0; j < kVector; ++j) sums(i + j) = from[j];
        }
    }
};

/// Order among the thread blocks that add to the same query tile.
struct Turn {
    int* counter;  // null: in any order

    __device__ __forceinline__ void wait(int turn) const {
        if (counter == nullptr) return;
        if (threadIdx.x == 0) {
            int finished;
            do {
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                             : "=r"(finished)
                             : "l"(counter)
                             : "memory");
            } while (finished < turn);
        }
        __syncthreads();
    }

    /// For every thread that added, before a barrier of the thread block ...
    __device__ __forceinline__ void publish() const {
        if (counter != nullptr) __threadfence();
    }

    /// ... and behind it: lets the next block add.
    __device__ __forceinline__ void pass_on() const {
        if (counter != nullptr && threadIdx.x == 0) atomicAdd(counter, 1);
    }
};

constexpr int kDeltaThreads = 256;
constexpr int kLanesPerRow = 16;  // 16 bytes each: head sizes up to 128

/// delta = rowsum(out * dout) for every query and head.
template <typename Element>
__global__ void __launch_bounds__(kDeltaThreads)
attention_delta_kernel(const __grid_constant__ BackwardArguments args) {
    const int64_t item =
        (int64_t{blockIdx.x} * kDeltaThreads + threadIdx.x) / kLanesPerRow;  // (query, head)
    const int lane = threadIdx.x % kLanesPerRow;
    const int64_t num_items = int64_t{args.plan.num_queries} * args.num_heads;
    float sum = 0;
    if (item < num_items && lane * 8 < args.head_dim) {
        using Vector = cutlass::AlignedArray<Element, 8>;
        const int64_t offset = item * args.head_dim + lane * 8;
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
        args.delta[head * args.plan.num_queries + query] = sum;
    }
}

/// A thread block's walk over the query tiles that see its keys, head after head of its group, from
/// the last tile of each head to the first.
struct QueryWalk {
    const AttentionPlan& plan;
    const SequenceTile& keys;
    int num_heads;
    int end_head;
    int block_m;
    int n_first;  // keys [n_first, n_end)
    int n_end;

    int head;
    int m_tile;
    int m_begin;

    /// Before the first tile; `advance` brings it there.
    __device__ QueryWalk(const AttentionPlan& plan, const SequenceTile& keys, int first_head,
                         int group, int num_heads, int block_m, int block_n)
        : plan(plan),
          keys(keys),
          num_heads(num_heads),
          end_head(first_head + group),
          block_m(block_m),
          n_first(keys.tile * block_n),
          n_end(keys.tile * block_n + block_n),
          head(first_head - 1),
          m_tile(0),
          m_begin(0) {}

    __device__ bool done() const { return head >= end_head; }

    __device__ void advance() {
        --m_tile;
        while (m_tile < m_begin) {
            if (++head >= end_head) return;
            const VisibleKeys visible(plan, keys, head, num_heads);
            const int first_query = visible.first_query_past(n_first);
            const int num_tiles = ceil_div(keys.num_q, block_m);
            m_begin = first_query < keys.num_q ? first_query / block_m : num_tiles;
            m_tile = ceil_div(visible.last_query_before(n_end), block_m) - 1;
        }
    }
};

/// Grid: key tiles (the longest first), key/value heads.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
attention_backward_kernel(const __grid_constant__ BackwardArguments args) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim, kThreads = Traits::kThreads;

    SequenceTile tile;
    if (!find_tile(args.plan, args.plan.cu_k_tiles, args.plan.cu_k, kBlockN,
                   static_cast<int>(blockIdx.x), tile)) {
        return;
    }
    const int kv_head = blockIdx.y;
    const int group = args.num_heads / args.num_kv_heads;
    const int64_t q_stride = int64_t{args.num_heads} * args.head_dim;
    const int64_t kv_stride = int64_t{args.num_kv_heads} * args.head_dim;
    const int n_first = tile.tile * kBlockN;
    const int keys_left = tile.num_k - n_first;
    const int64_t kv_offset =
        (int64_t{tile.k_first} + n_first) * kv_stride + int64_t{kv_head} * args.head_dim;
    const int q_tiles_before =
        args.plan.cu_q_tiles != nullptr ? args.plan.cu_q_tiles[tile.sequence] : 0;

    extern __shared__ __align__(128) std::byte shared_bytes[];
    auto* shared = reinterpret_cast<Element*>(shared_bytes);
    auto sK = make_tensor(make_smem_ptr(shared), typename Traits::LayoutK{});
    auto sV = make_tensor(sK.data() + size(sK), typename Traits::LayoutK{});
    auto sQ = make_tensor(sV.data() + size(sV), typename Traits::LayoutQ{});  // and a second one
    auto sdO = make_tensor(sQ.data() + 2 * size(sQ), typename Traits::LayoutQ{});
    auto sP = make_tensor(sdO.data() + size(sdO), typename Traits::LayoutS{});
    auto sdS = make_tensor(sP.data() + size(sP), typename Traits::LayoutS{});
    const auto sKt = make_tensor(sK.data(), typename Traits::LayoutKTransposed{});
    const auto sdOt = make_tensor(sdO.data(), typename Traits::LayoutQTransposed{});
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
    auto dv = partition_fragment_C(key_mma, TileShape<kBlockN, kHeadDim>{});
    clear(dk);
    clear(dv);

    const auto query_rows = [&](const void* base, const QueryWalk& at) {
        const int row = at.m_tile * kBlockM;
        const int64_t offset =
            (int64_t{tile.q_first} + row) * q_stride + int64_t{at.head} * args.head_dim;
        return GlobalRows<const Element>{static_cast<const Element*>(base) + offset, q_stride,
                                         tile.num_q - row, args.head_dim};
    };
    const float scale_log2 = args.scale * float(M_LOG2E);
    // Per row: the log-sum-exp in base 2, and delta. Rows past the end get probability 0.
    float lse[kRows], delta[kRows];
    const auto load_statistics = [&](const QueryWalk& at) {
        const int64_t offset = int64_t{at.head} * args.plan.num_queries + tile.q_first;
        CUTE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const int row = at.m_tile * kBlockM + get<0>(where(r, _0{}));
            const bool exists = row < tile.num_q;
            lse[r] = exists ? __ldg(args.lse + offset + row) * float(M_LOG2E) : INFINITY;
            delta[r] = exists ? __ldg(args.delta + offset + row) : 0.0f;
        }
    };

    QueryWalk walk(args.plan, tile, kv_head * group, group, args.num_heads, kBlockM, kBlockN);
    walk.advance();
    int buffer = 0;       // which Q holds the tile of `walk`
    Turn turn{nullptr};  // at the tile before, passed on when its sums have long been written
    if (!walk.done()) {
        const auto kv_rows = [&](const void* base) {
            return GlobalRows<const Element>{static_cast<const Element*>(base) + kv_offset,
                                             kv_stride, keys_left, args.head_dim};
        };
        load_tile_async<kThreads, kBlockN, kHeadDim>(kv_rows(args.k), sK);
        load_tile_async<kThreads, kBlockN, kHeadDim>(kv_rows(args.v), sV);
        load_tile_async<kThreads, kBlockM, kHeadDim>(query_rows(args.q, walk), sQ);
        load_tile_async<kThreads, kBlockM, kHeadDim>(query_rows(args.dout, walk), sdO);
        cp_async_fence();
    }
    while (!walk.done()) {
        load_statistics(walk);
        QueryWalk next = walk;
        next.advance();
        const auto sQ_now = make_tensor(sQ.data() + buffer * size(sQ), typename Traits::LayoutQ{});
        auto sQ_next =
            make_tensor(sQ.data() + (buffer ^ 1) * size(sQ), typename Traits::LayoutQ{});

        cp_async_wait<0>();
        turn.publish();
        __syncthreads();  // Q and dO are there; everyone is done with dS and the other Q
        turn.pass_on();
        if (!next.done()) {
            load_tile_async<kThreads, kBlockM, kHeadDim>(query_rows(args.q, next), sQ_next);
            cp_async_fence();
        }

        auto scores = partition_fragment_C(score_mma, TileShape<kBlockM, kBlockN>{});
        clear(scores);
        multiply(score_mma, left_operand(LoadFragment<Element>{}, score_mma, sQ_now),
                 right_operand(LoadFragment<Element>{}, score_mma, sK), scores);
        auto score_rows = by_row_and_column(scores);
        CUTE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            CUTE_UNROLL
            for (int c = 0; c < size<1>(score_rows); ++c) {
                score_rows(r, c) = exp2_approx(fmaf(score_rows(r, c), scale_log2, -lse[r]));
            }
        }
        const VisibleKeys visible(args.plan, tile, walk.head, args.num_heads);
        const int m_first = walk.m_tile * kBlockM;
        const int2 seen_by_first = visible(m_first);
        const int2 seen_by_last = visible(m_first + kBlockM - 1);
        if (n_first < seen_by_last.x || n_first + kBlockN > seen_by_first.y) {
            CUTE_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const int2 seen = visible(m_first + get<0>(where(r, _0{})));
                CUTE_UNROLL
                for (int c = 0; c < size<1>(score_rows); ++c) {
                    const int key = n_first + get<1>(where(r, c));
                    if (key < seen.x || key >= seen.y) score_rows(r, c) = 0.0f;
                }
            }
        }

        auto dscores = partition_fragment_C(score_mma, TileShape<kBlockM, kBlockN>{});
        clear(dscores);
        multiply(score_mma, left_operand(LoadFragment<Element>{}, score_mma, sdO),
                 right_operand(LoadFragment<Element>{}, score_mma, sV), dscores);
        auto dscore_rows = by_row_and_column(dscores);
        CUTE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            CUTE_UNROLL
            for (int c = 0; c < size<1>(dscore_rows); ++c) {
                dscore_rows(r, c) = score_rows(r, c) * (dscore_rows(r, c) - delta[r]);
            }
        }
        store_accumulators<Element>(score_mma, round_to<Element>(scores), sP);
        store_accumulators<Element>(score_mma, round_to<Element>(dscores), sdS);
        __syncthreads();  // P and dS are there

        multiply(key_mma, left_operand(LoadFragmentTransposed<Element>{}, key_mma, sPt),
                 right_operand(LoadFragmentTransposed<Element>{}, key_mma, sdOt), dv);
        __syncthreads();  // everyone is done with dO
        if (!next.done()) {
            load_tile_async<kThreads, kBlockM, kHeadDim>(query_rows(args.dout, next), sdO);
            cp_async_fence();
        }

        auto dq = partition_fragment_C(query_mma, TileShape<kBlockM, kHeadDim>{});
        clear(dq);
        multiply(query_mma, left_operand(LoadFragment<Element>{}, query_mma, sdS),
                 right_operand(LoadFragmentTransposed<Element>{}, query_mma, sKt), dq);
        const int packed_tile = q_tiles_before + walk.m_tile;
        const DqSums<Traits> dq_sums(args, walk.head, packed_tile);
        if (args.turns != nullptr) {
            turn.counter = args.turns + int64_t{walk.head} * args.plan.max_q_tiles + packed_tile;
        }
        turn.wait(tile.tile - seen_by_first.x / kBlockN);
        dq_sums.add(dq);

        const auto sQt_now = make_tensor(sQ_now.data(), typename Traits::LayoutQTransposed{});
        multiply(key_mma, left_operand(LoadFragmentTransposed<Element>{}, key_mma, sdSt),
                 right_operand(LoadFragmentTransposed<Element>{}, key_mma, sQt_now), dk);
        walk.head = next.head;
        walk.m_tile = next.m_tile;
        walk.m_begin = next.m_begin;
        buffer ^= 1;
    }

    CUTE_UNROLL
    for (int i = 0; i < size(dk); ++i) dk(i) *= args.scale;
    turn.publish();
    __syncthreads();  // everyone is done with K and V, whose places the results take
    turn.pass_on();
    store_accumulators<Element>(key_mma, round_to<Element>(dk), sK);
    store_accumulators<Element>(key_mma, round_to<Element>(dv), sV);
    __syncthreads();
    const auto gradient_rows = [&](void* base) {
        return GlobalRows<Element>{static_cast<Element*>(base) + kv_offset, kv_stride, keys_left,
                                   args.head_dim};
    };
    store_tile<kThreads, kBlockN, kHeadDim>(sK, gradient_rows(args.dk));
    store_tile<kThreads, kBlockN, kHeadDim>(sV, gradient_rows(args.dv));
}

/// Rounds the sums of dq. Grid: query tiles, heads.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
attention_dq_kernel(const __grid_constant__ BackwardArguments args) {
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
    DqSums<Traits>(args, head, static_cast<int>(blockIdx.x)).read(dq);
    CUTE_UNROLL
    for (int i = 0; i < size(dq); ++i) dq(i) *= args.scale;

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

/// Scratch of the backward pass after the plan's own: delta, the sums of dq, the turns.
template <typename Traits>
struct BackwardScratch {
    int64_t delta_bytes, sums_bytes, turns_bytes;

    explicit BackwardScratch(const SegmentAttentionBackwardParams& params) {
        const SegmentAttentionParams& p = params.forward;
        const int64_t num_heads = p.q.size(1);
        const int64_t tiles = max_tiles(p.q.size(0), p.cu_q.size(0) - 1, Traits::kBlockM);
        constexpr int64_t kTileBytes = int64_t{Traits::kBlockM} * Traits::kHeadDim * sizeof(float);
        delta_bytes = round_up(num_heads * p.q.size(0) * int64_t{sizeof(float)}, 256);
        sums_bytes = num_heads * tiles * kTileBytes;
        turns_bytes = params.deterministic ? num_heads * tiles * int64_t{sizeof(int)} : 0;
    }

    int64_t total() const { return delta_bytes + sums_bytes + turns_bytes; }
};

template <typename Traits>
void launch_backward_kernels(const SegmentAttentionBackwardParams& params, cudaStream_t stream) {
    constexpr const char* kOp = "segment_attention_backward";
    const SegmentAttentionParams& p = params.forward;
    const BackwardScratch<Traits> scratch(params);
    auto* bytes = p.scratch.as<std::byte>();
    auto* after_plan = bytes + plan_bytes(p);

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
    args.delta = reinterpret_cast<float*>(after_plan);
    args.dq_sums = reinterpret_cast<float*>(after_plan + scratch.delta_bytes);
    if (params.deterministic) {
        args.turns =
            reinterpret_cast<int*>(after_plan + scratch.delta_bytes + scratch.sums_bytes);
    }
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    args.plan = make_plan(p, kBlockM, kBlockN, bytes, stream);
    args.num_heads = static_cast<int>(p.q.size(1));
    args.num_kv_heads = static_cast<int>(p.k.size(1));
    args.head_dim = static_cast<int>(p.q.size(2));
    args.scale = p.scale;

    // The sums and, where there are any, the turns behind them.
    check_status(kOp, cudaMemsetAsync(args.dq_sums, 0, scratch.sums_bytes + scratch.turns_bytes,
                                      stream));
    const int64_t delta_threads = p.q.size(0) * p.q.size(1) * kLanesPerRow;
    if (delta_threads > 0) {
        attention_delta_kernel<typename Traits::Element>
            <<<static_cast<unsigned>(ceil_div<int64_t>(delta_threads, kDeltaThreads)),
               kDeltaThreads, 0, stream>>>(args);
        check_launch(kOp);
    }
    auto* kernel = attention_backward_kernel<Traits>;
    reserve_shared_memory(kOp, kernel, Traits::kSharedBytes);
    const dim3 key_grid(static_cast<unsigned>(args.plan.max_k_tiles),
                        static_cast<unsigned>(args.num_kv_heads));
    kernel<<<key_grid, Traits::kThreads, Traits::kSharedBytes, stream>>>(args);
    check_launch(kOp);
    const dim3 query_grid(static_cast<unsigned>(args.plan.max_q_tiles),
                          static_cast<unsigned>(args.num_heads));
    attention_dq_kernel<Traits><<<query_grid, Traits::kThreads, 0, stream>>>(args);
    check_launch(kOp);
}

/// Calls `body(Traits{})` with the tiles asked for.
template <typename Element, int kHeadDim, typename Body>
auto with_tiles(bool small, Body&& body) {
    if (small) return body(BackwardTraits<Element, kHeadDim, BackwardTiles::kSmall>{});
    return body(BackwardTraits<Element, kHeadDim, BackwardTiles::kLarge>{});
}

template <typename Element, int kHeadDim>
int64_t BackwardPass<Element, kHeadDim>::scratch_bytes(
    const SegmentAttentionBackwardParams& params, bool small) {
    return with_tiles<Element, kHeadDim>(small, [&]<typename Traits>(Traits) {
        return plan_bytes(params.forward) + BackwardScratch<Traits>(params).total();
    });
}

template <typename Element, int kHeadDim>
void BackwardPass<Element, kHeadDim>::launch(const SegmentAttentionBackwardParams& params,
                                             bool small, cudaStream_t stream) {
    with_tiles<Element, kHeadDim>(small, [&]<typename Traits>(Traits) {
        launch_backward_kernels<Traits>(params, stream);
    });
}

}  // namespace lemo::cuda
