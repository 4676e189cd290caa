// The backward attention kernel for compute capability 9.0.
//
// A thread block has a tile of keys of one key/value head and walks over the query tiles that see
// them, in every query head of the group: dk and dv are sums in the registers of two consumer
// warpgroups, 64 keys each. A producer warp copies queries and output gradients; another warp adds
// each step's part of dq to scratch, in a fixed order of the blocks if asked to be deterministic.
//
// The consumers take turns to start the products of a step, so that what one computes falls beneath
// the products of the other. What a step adds to dq needs the keys of both; it is computed a step
// later, when the other one is done with it, too, and handed over beneath dv and dk.
//
// The turns order the gradients of scores as well: what a warpgroup wrote before its turn of a step
// both read in their turns of the next one, and when a turn starts, both are done with what was
// written two steps before. With three buffers nobody has to wait for anything else.
//
// Every lane that loads or stores arrives for itself (see Barrier). Three times a step at barriers
// in memory, in the midst of a warpgroup's own work, made head size 64 1.45 times as slow. So it is
// once, beneath products; elsewhere it is at named barriers, which take a warp at once.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/launch.h"
#include "common/vector.h"
#include "segment_attention/hopper/backward_rows.h"
#include "segment_attention/hopper/fragments.h"
#include "segment_attention/hopper/kernels.h"
#include "segment_attention/hopper/load_tile.h"
#include "segment_attention/hopper/turns.h"
#include "segment_attention/query_walk.h"

namespace lemo::cuda::hopper {

/// What a thread block works on, for the warps that copy.
template <typename Traits>
struct BackwardWork {
    int kv_head;
    SequenceTile tile;
    int q_tiles_before;
    QueryWalk walk;

    __device__ BackwardWork(const BackwardArguments& args, const SequenceTile& tile, int kv_head)
        : kv_head(kv_head),
          tile(tile),
          q_tiles_before(args.plan.cu_q_tiles != nullptr ? args.plan.cu_q_tiles[tile.sequence]
                                                         : 0),
          walk(args.plan, tile, kv_head * (args.num_heads / args.num_kv_heads),
               args.num_heads / args.num_kv_heads, args.num_heads, Traits::kBlockM,
               Traits::kBlockN) {}

    /// Whether some query of a tile does not see all keys of the block.
    __device__ bool needs_mask(const BackwardArguments& args, const QueryStep& step) const {
        const VisibleKeys visible(args.plan, tile, step.head, args.num_heads);
        const int m_first = step.m_tile * Traits::kBlockM;
        const int n_first = tile.tile * Traits::kBlockN;
        return n_first < visible(m_first + Traits::kBlockM - 1).x ||
               n_first + Traits::kBlockN > visible(m_first).y;
    }
};

template <typename Traits>
__device__ void init_barriers(BackwardShared<Traits>& shared) {
    constexpr int kConsumerThreads = kWarpgroupThreads * Traits::kConsumers;
    constexpr int kConsumerWarps = kConsumerThreads / 32;
    shared.kv_full.init(1);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
        shared.q_full[stage].init(1);
        shared.dout_full[stage].init(1);
        // Each lane for what it loaded, then each warp for its products.
        shared.step_empty[stage].init(kConsumerThreads + kConsumerWarps);
    }
    for (int warpgroup = 0; warpgroup < Traits::kConsumers; ++warpgroup) {
        shared.dq_empty[warpgroup].init(1);
    }
    publish_barriers();
}

/// Copies everything that the consumers read; run by one thread.
template <typename Traits>
__device__ void produce(const BackwardArguments& args, BackwardShared<Traits>& shared,
                        const BackwardWork<Traits>& work) {
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim;
    constexpr int kRowBytes = kBlockM * static_cast<int>(sizeof(float));
    constexpr int kQueryBytes = kTileBytes<kBlockM, kHeadDim, Element> + kRowBytes;

    QueryStep step = work.walk.first();
    if (!work.walk.done(step)) {
        const int key_row = work.tile.k_first + work.tile.tile * kBlockN;
        shared.kv_full.arrive_expecting(2 * kTileBytes<kBlockN, kHeadDim, Element>);
        copy_tile<kBlockN, kHeadDim>(args.k, shared.kv_full, shared.k, work.kv_head, key_row);
        copy_tile<kBlockN, kHeadDim>(args.v, shared.kv_full, shared.v, work.kv_head, key_row);
    }
    RingPosition<Traits::kStages> at;
    for (; !work.walk.done(step); work.walk.advance(step)) {
        const int row = work.tile.q_first + step.m_tile * kBlockM;
        const int64_t first =
            args.tile_index(step.head, work.q_tiles_before + step.m_tile) * kBlockM;
        const BackwardStep shown{step.head, step.m_tile, work.needs_mask(args, step)};
        shared.step_empty[at.stage].wait(at.parity ^ 1);
        shared.steps[at.stage] = shown;
        Barrier& q_full = shared.q_full[at.stage];
        q_full.arrive_expecting(kQueryBytes);
        copy_tile<kBlockM, kHeadDim>(args.q, q_full, shared.q[at.stage], step.head, row);
        copy_bytes(args.tile_lse + first, q_full, shared.lse[at.stage], kRowBytes);

        Barrier& dout_full = shared.dout_full[at.stage];
        dout_full.arrive_expecting(kQueryBytes);
        copy_tile<kBlockM, kHeadDim>(args.dout, dout_full, shared.dout[at.stage], step.head, row);
        copy_bytes(args.tile_delta + first, dout_full, shared.delta[at.stage], kRowBytes);
        at.advance();
    }
    shared.step_empty[at.stage].wait(at.parity ^ 1);
    shared.steps[at.stage].m_tile = -1;
    shared.q_full[at.stage].arrive();
}

/// Adds the consumers' parts of dq to scratch; run by one warp, since only whole warps wait at
/// named barriers. Its first lane does the work.
template <typename Traits>
__device__ void add_dq(const BackwardArguments& args, BackwardShared<Traits>& shared,
                       const BackwardWork<Traits>& work) {
    constexpr int kPart = Traits::kDqPart;
    constexpr int kPartBytes = kPart * static_cast<int>(sizeof(float));
    const bool adds = threadIdx.x % 32 == 0;
    for (QueryStep step = work.walk.first(); !work.walk.done(step); work.walk.advance(step)) {
        const int64_t tile_index =
            args.tile_index(step.head, work.q_tiles_before + step.m_tile);
        int* turn = nullptr;
        if (args.turns != nullptr && adds) {
            // The key tiles that add before this one are those from the first that the query tile
            // sees. Their blocks have smaller indices, so they run.
            const VisibleKeys visible(args.plan, work.tile, step.head, args.num_heads);
            const int before =
                work.tile.tile - visible(step.m_tile * Traits::kBlockM).x / Traits::kBlockN;
            turn = args.turns + tile_index;
            int finished;
            do {
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                             : "=r"(finished)
                             : "l"(turn)
                             : "memory");
            } while (finished < before);
        }
        float* to = args.dq_sums + tile_index * Traits::kConsumers * kPart;
        CUTE_UNROLL
        for (int warpgroup = 0; warpgroup < Traits::kConsumers; ++warpgroup) {
            __syncwarp();
            sync_named(kFirstDqBarrier + warpgroup, kDqThreads);
            if (adds) {
                publish_shared_writes();  // for all who wrote: they would wait for it longer
                add_floats(to + warpgroup * kPart, shared.dq[warpgroup], kPartBytes);
                commit_adds();
            }
        }
        if (adds) {
            wait_adds_read<1>();
            shared.dq_empty[0].arrive();
            wait_adds_read<0>();
            shared.dq_empty[1].arrive();
        }
        if (turn != nullptr) {
            wait_adds<0>();
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
            atomicAdd(turn, 1);
        }
    }
    if (adds) wait_adds<0>();
}

/// Takes away probabilities [keys, queries] of keys that a query does not see.
template <typename Traits, typename Scores>
__device__ __forceinline__ void hide_unseen(const BackwardArguments& args,
                                            const BackwardShared<Traits>& shared,
                                            const BackwardStep& step, int warpgroup,
                                            Scores& scores) {
    const SequenceTile tile = shared.tile;
    const VisibleKeys visible(args.plan, tile, step.head, args.num_heads);
    const int query = step.m_tile * Traits::kBlockM + thread_column();
    const int key = tile.tile * Traits::kBlockN + warpgroup * 64 + thread_row();
    CUTE_UNROLL
    for (int e = 0; e < kRowElements<Traits::kBlockM>; ++e) {
        const int2 seen = visible(query + element_column(e));
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
            if (key + 8 * r < seen.x || key + 8 * r >= seen.y) {
                scores(element_index(r, e)) = 0.0f;
            }
        }
    }
}

/// Where a thread's part of the gradient of the scores lies, which is stored as [queries, keys]:
/// its row of the matrices of 16 queries that store_matrices_transposed writes at a time.
template <typename Traits>
struct DscoresPlace {
    int offset;

    __device__ explicit DscoresPlace(int warpgroup) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int warp = static_cast<int>(threadIdx.x) % kWarpgroupThreads / 32;
        const int query = lane / 16 * 8 + lane % 8;
        const int piece = (warp * 2 + lane / 8 % 2) ^ (query % 8);
        // A warpgroup's keys are one column of swizzled rows of 128 bytes.
        offset = warpgroup * 64 * Traits::kBlockM + query * 64 + piece * 8;
    }

    __device__ __forceinline__ auto* of(typename Traits::Element* dscores, int step) const {
        return dscores + offset + step * 16 * 64;
    }
};

template <typename Traits>
__device__ void consume(const BackwardArguments& args, BackwardShared<Traits>& shared,
                        int warpgroup) {
    using namespace cute;
    using Element = typename Traits::Element;
    constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    constexpr int kHeadDim = Traits::kHeadDim;
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;

    typename Traits::ScoreMma score_mma;
    typename Traits::KeyMma key_mma;
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
    const auto keys_operand = [&](auto* tile) {
        return score_mma.get_slice(first_thread)
            .partition_fragment_A(tile_of(tile, typename Traits::LayoutK{}));
    };
    const auto queries_operand = [&](auto* tile) {
        return score_mma.get_slice(first_thread)
            .partition_fragment_B(tile_of(tile, typename Traits::LayoutQ{}));
    };
    const auto query_columns_operand = [&](auto* tile) {
        return key_mma.get_slice(first_thread)
            .partition_fragment_B(tile_of(tile, typename Traits::LayoutQTransposed{}));
    };

    auto dk = partition_fragment_C(key_mma, TileShape<kBlockN, kHeadDim>{});
    auto dv = partition_fragment_C(key_mma, TileShape<kBlockN, kHeadDim>{});
    clear(dk);
    clear(dv);
    // Zeros are there before the first product starts: set later, they would stop it.
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

    const float scale_log2 = args.scale * float(M_LOG2E);
    RingPosition<Traits::kStages> at;
    RingPosition<Traits::kDscoresStages> dscores_at, dq_at;
    uint32_t dq_parity = 1;
    const Turns<Traits::kConsumers> turns(warpgroup);

    const auto start_scores = [&]() __attribute__((always_inline)) {
        start_product<false>(score_mma, keys_operand(shared.k), queries_operand(shared.q[at.stage]),
                             scores);
    };
    // What a thread's queries have in shared memory, two of every eight: log-sum-exp or delta.
    using Statistics = float2[kBlockM / 8];
    Statistics delta;
    const auto load_statistics = [](Statistics& to, const float* from)
                                     __attribute__((always_inline)) {
        CUTE_UNROLL
        for (int i = 0; i < kBlockM / 8; ++i) {
            to[i] = *reinterpret_cast<const float2*>(from + thread_column() + 8 * i);
        }
    };
    // The scores of the step at `at` are there: makes them probabilities, beneath the product that
    // becomes their gradient. Afterwards no product is under way: the compiler does
    // not follow one from one round of a loop into the next, and would wait for each at once.
    const auto begin_step = [&]() __attribute__((always_inline)) {
        Statistics lse;
        load_statistics(lse, shared.lse[at.stage]);
        shared.dout_full[at.stage].wait(at.parity);
        start_product<false>(score_mma, keys_operand(shared.v),
                             queries_operand(shared.dout[at.stage]), dscores);
        CUTE_UNROLL
        for (int i = 0; i < size(scores); i += 2) {
            scores(i) = exp2_approx(fmaf(scores(i), scale_log2, -lse[i / 4].x));
            scores(i + 1) = exp2_approx(fmaf(scores(i + 1), scale_log2, -lse[i / 4].y));
        }
        const BackwardStep step = shared.steps[at.stage];
        if (step.needs_mask) hide_unseen(args, shared, step, warpgroup, scores);
        load_statistics(delta, shared.delta[at.stage]);
        wait_products<0>();
    };
    // In the registers of the scores: when it is computed they are not needed, and are again only
    // when it has been handed over.
    auto dq = make_tensor(
        scores.data(),
        partition_fragment_C(query_mma, TileShape<kHeadDim, kBlockM>{}).layout());
    static_assert(size(dq) <= size(scores));
    const auto hand_over_dq = [&]() __attribute__((always_inline)) {
        shared.dq_empty[warpgroup].wait(dq_parity);
        dq_parity ^= 1;
        auto* part =
            reinterpret_cast<float4*>(shared.dq[warpgroup]) + thread % kWarpgroupThreads;
        CUTE_UNROLL
        for (int i = 0; i < size(dq); i += 4) {
            part[i / 4 * kWarpgroupThreads] =
                make_float4(dq(i), dq(i + 1), dq(i + 2), dq(i + 3));
        }
        arrive_named(kFirstDqBarrier + warpgroup, kDqThreads);
        dq_at.advance();
    };
    const auto start_dq = [&]() __attribute__((always_inline)) {
        const auto slice = query_mma.get_slice(first_thread);
        start_product<false>(
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
        wait_products<0>();
        forget_operands();
        begin_step();
        for (bool first_step = true;; first_step = false) {
            // Gradient of the scores, 16 queries at a time, so that registers come free early.
            CUTE_UNROLL
            for (int i = 0; i < size(scores); i += 8) {
                CUTE_UNROLL
                for (int j = i; j < i + 8; j += 2) {
                    probability_pairs(j / 2) = round_pair<Element>(scores(j), scores(j + 1));
                    dscore_pairs(j / 2) =
                        round_pair<Element>(scores(j) * (dscores(j) - delta[j / 4].x),
                                            scores(j + 1) * (dscores(j + 1) - delta[j / 4].y));
                }
                store_matrices_transposed(
                    dscores_place.of(shared.dscores[dscores_at.stage], i / 8), dscore_pairs(i / 2),
                    dscore_pairs(i / 2 + 1), dscore_pairs(i / 2 + 2), dscore_pairs(i / 2 + 3));
            }
            publish_shared_writes();
            dscores_at.advance();

            // The compiler does not follow products around a branch. So dq before the first step
            // and the scores behind the last one are computed, of what lies there, for nobody.
            turns.wait();  // for the other one's gradient of scores of the step before, too
            start_dq();
            start_product<true>(key_mma, as_register_operand<kBlockM>(probabilities),
                                query_columns_operand(shared.dout[at.stage]), dv);
            start_product<true>(key_mma, as_register_operand<kBlockM>(rounded),
                                query_columns_operand(shared.q[at.stage]), dk);
            wait_products<2>();  // dq
            if (!first_step) hand_over_dq();
            Barrier& step_empty = shared.step_empty[at.stage];
            at.advance();
            shared.q_full[at.stage].wait(at.parity);
            start_scores();
            turns.pass_on();
            step_empty.arrive();  // for its loads; 32 arrivals take time, which the products hide
            wait_products<0>();
            step_empty.arrive_warp();
            if (shared.steps[at.stage].m_tile < 0) break;
            forget_operands();
            begin_step();
        }
        turns.finish();  // for the other one's gradient of the last scores
        start_dq();
        wait_products<0>();
        hand_over_dq();
    } else {
        turns.finish();
    }

    CUTE_UNROLL
    for (int i = 0; i < size(dk); ++i) dk(i) *= args.scale;
    // The results leave by way of the places of K and V, which all consumers are done with.
    sync_named(kKeysBarrier, Traits::kConsumers * kWarpgroupThreads);
    const SequenceTile tile = shared.tile;
    const int warp_row = thread / 32 * 16;
    const int row = tile.tile * kBlockN + warp_row;
    const int64_t stride = int64_t{args.num_kv_heads} * args.head_dim;
    const int64_t offset =
        (tile.k_first + row) * stride + int64_t{shared.kv_head} * args.head_dim;
    const auto rows_out = [&](void* base) {
        return RowsOut<Element>{static_cast<Element*>(base) + offset, stride, tile.num_k - row,
                                args.head_dim};
    };
    store_rows<kHeadDim>(dk, shared.k + warp_row * kHeadDim, rows_out(args.dk));
    store_rows<kHeadDim>(dv, shared.v + warp_row * kHeadDim, rows_out(args.dv));
}

/// The key/value head and packed key tile of a thread block. A few heads at a time, so that their
/// queries stay in the L2 cache; tiles from the first, which the most queries see.
__device__ __forceinline__ int2 head_and_tile(const BackwardArguments& args) {
    const int block = static_cast<int>(blockIdx.x);
    const int section_blocks = args.heads_at_once * args.plan.max_k_tiles;
    const int first_head = block / section_blocks * args.heads_at_once;
    const int heads = min(args.heads_at_once, args.num_kv_heads - first_head);
    const int rest = block % section_blocks;
    return make_int2(first_head + rest % heads, rest / heads);
}

/// Grid: key/value heads times key tiles.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
attention_backward_kernel(const __grid_constant__ BackwardArguments args) {
    extern __shared__ __align__(1024) std::byte shared_bytes[];
    auto& shared = *reinterpret_cast<BackwardShared<Traits>*>(shared_bytes);
    const int2 place = head_and_tile(args);
    SequenceTile tile;
    if (!find_tile(args.plan, args.plan.cu_k_tiles, args.plan.cu_k, Traits::kBlockN, place.y,
                   tile)) {
        return;
    }
    if (threadIdx.x == 0) {
        init_barriers(shared);
        shared.kv_head = place.x;
        shared.tile = tile;
    }
    __syncthreads();
    const int warpgroup = warp_uniform(static_cast<int>(threadIdx.x) / kWarpgroupThreads);
    if (warpgroup == 0) {
        cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
        if (threadIdx.x == 0) {
            produce(args, shared, BackwardWork<Traits>(args, shared.tile, shared.kv_head));
        } else if (threadIdx.x / 32 == 1) {
            add_dq(args, shared, BackwardWork<Traits>(args, shared.tile, shared.kv_head));
        }
    } else {
        cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
        consume(args, shared, warpgroup - 1);
    }
}

/// Scratch of the backward pass after the plan's own.
template <typename Traits>
struct BackwardScratch {
    int64_t rows_bytes, sums_bytes, turns_bytes;

    explicit BackwardScratch(const SegmentAttentionBackwardParams& params) {
        const SegmentAttentionParams& p = params.forward;
        const int64_t tiles =
            p.q.size(1) * max_tiles(p.q.size(0), p.cu_q.size(0) - 1, Traits::kBlockM);
        rows_bytes = tiles * Traits::kBlockM * int64_t{sizeof(float)};
        sums_bytes = rows_bytes * Traits::kHeadDim;
        turns_bytes = params.deterministic ? tiles * int64_t{sizeof(int)} : 0;
    }

    // tile_lse and tile_delta first.
    int64_t total() const { return 2 * rows_bytes + sums_bytes + turns_bytes; }
};

template <typename Element, int kHeadDim>
int64_t BackwardPass<Element, kHeadDim>::scratch_bytes(
    const SegmentAttentionBackwardParams& params) {
    return plan_bytes(params.forward) +
           BackwardScratch<BackwardTraits<Element, kHeadDim>>(params).total();
}

template <typename Element, int kHeadDim>
void BackwardPass<Element, kHeadDim>::launch(const SegmentAttentionBackwardParams& params,
                                             cudaStream_t stream) {
    using Traits = BackwardTraits<Element, kHeadDim>;
    constexpr const char* kOp = "segment_attention_backward";
    const SegmentAttentionParams& p = params.forward;
    const BackwardScratch<Traits> scratch(params);
    BackwardArguments args{};
    args.q = make_tensor_map(kOp, p.q, Traits::kBlockM);
    args.k = make_tensor_map(kOp, p.k, Traits::kBlockN);
    args.v = make_tensor_map(kOp, p.v, Traits::kBlockN);
    args.dout = make_tensor_map(kOp, params.dout, Traits::kBlockM);
    args.out = p.out.data;
    args.dout_rows = params.dout.data;
    args.lse = p.lse.as<const float>();
    args.dq = params.dq.data;
    args.dk = params.dk.data;
    args.dv = params.dv.data;
    auto* bytes = p.scratch.as<std::byte>();
    args.plan = make_plan(p, Traits::kBlockM, Traits::kBlockN, bytes, stream);
    bytes += plan_bytes(p);
    args.tile_lse = reinterpret_cast<float*>(bytes);
    args.tile_delta = reinterpret_cast<float*>(bytes += scratch.rows_bytes);
    args.dq_sums = reinterpret_cast<float*>(bytes += scratch.rows_bytes);
    bytes += scratch.sums_bytes;
    args.turns = params.deterministic ? reinterpret_cast<int*>(bytes) : nullptr;
    args.num_heads = static_cast<int>(p.q.size(1));
    args.num_kv_heads = static_cast<int>(p.k.size(1));
    args.head_dim = static_cast<int>(p.q.size(2));
    args.scale = p.scale;

    const dim3 query_grid(static_cast<unsigned>(args.plan.max_q_tiles),
                          static_cast<unsigned>(args.num_heads));
    attention_statistics_kernel<Traits><<<query_grid, kRowKernelThreads, 0, stream>>>(args);
    check_launch(kOp);
    auto* kernel = attention_backward_kernel<Traits>;
    constexpr int kSharedBytes = static_cast<int>(sizeof(BackwardShared<Traits>));
    reserve_shared_memory(kOp, kernel, kSharedBytes);
    // As few as occupy the GPU: the queries and the sums of dq of a head then stay in the L2 cache.
    const int multiprocessors = num_multiprocessors(kOp);
    args.heads_at_once = std::clamp(
        (multiprocessors + args.plan.max_k_tiles / 2) / std::max(args.plan.max_k_tiles, 1), 1,
        args.num_kv_heads);
    const int blocks = args.num_kv_heads * args.plan.max_k_tiles;
    kernel<<<blocks, Traits::kThreads, kSharedBytes, stream>>>(args);
    check_launch(kOp);
    attention_dq_kernel<Traits><<<query_grid, kRowKernelThreads, 0, stream>>>(args);
    check_launch(kOp);
}

}  // namespace lemo::cuda::hopper
