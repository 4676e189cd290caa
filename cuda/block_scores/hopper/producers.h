// The warps of the producer warpgroup: one plans the jobs, one copies queries and keys, and one
// adds up the maxima that the consumers have found.
#pragma once

#include "block_scores/hopper/traits.h"

namespace lemo::cuda::block_scores::hopper {

/// One warp: finds the pairs of tiles and what their blocks are.
template <typename Traits>
class JobPlanner {
public:
    __device__ JobPlanner(const ScoresArguments& args, ScoresShared<Traits>& shared)
        : args_(args), shared_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

    __device__ void run() {
        for (;;) {
            Item item{};
            if (lane_ == 0) item = take_item(args_);
            item.key_tile = __shfl_sync(0xffffffffu, item.key_tile, 0);
            item.part = __shfl_sync(0xffffffffu, item.part, 0);
            if (item.key_tile < 0) break;
            PairWalk walk;
            Pair pair = walk.enter(args_, item);
            while (pair.query_tile >= 0) {
                const Pair next = walk.after(args_, pair);
                put(walk, pair, item.part, next.query_tile < 0);
                pair = next;
            }
        }
        shared_.job_empty[at_.stage].wait(at_.parity ^ 1);
        if (lane_ == 0) shared_.jobs[at_.stage].key_halves = 0;
        shared_.job_full[at_.stage].arrive();
    }

private:
    __device__ void put(const PairWalk& walk, const Pair& pair, int part, bool last_of_item) {
        const int first_query = args_.scratch.query_first[pair.query_tile];
        const int end_query = args_.scratch.query_first[pair.query_tile + 1];
        shared_.job_empty[at_.stage].wait(at_.parity ^ 1);
        Job& job = shared_.jobs[at_.stage];
        if (lane_ < kQueryRows / 32) job.query_starts[lane_] = 0;
        if (lane_ < kKeyRows / 32) job.key_starts[lane_] = 0;
        __syncwarp();
        mark<kQueryRows>(job.query_starts, first_query, end_query, pair.query_row);
        mark<kKeyRows>(job.key_starts, walk.first_block, walk.first_block + walk.num_keys,
                       pair.key_row);
        __syncwarp();
        const bool mixed = lane_ < kKeyRows / 32 && (job.key_starts[lane_] & 0xfefefefeu) != 0;
        const bool mixed_columns = __any_sync(0xffffffffu, mixed);
        if (lane_ == 0) {
            job.query_row = pair.query_row;
            job.query_end = pair.query_end;
            job.key_row = pair.key_row;
            job.key_end = walk.key_end;
            job.num_queries = end_query - first_query;
            job.num_keys = walk.num_keys;
            // The last query sees most.
            const int last_row = min(pair.query_row + kQueryRows, pair.query_end) - 1;
            const int second_half = pair.key_row + Traits::kMmaKeys;
            job.key_halves = second_half < min(walk.key_end, last_row) ? 2 : 1;
            job.first_of_tile =
                pair.key_row == walk.key_first && pair.query_row == args_.block_starts[first_query];
            job.last_of_tile = walk.last_of_tile(pair);
            job.last_of_item = last_of_item;
            job.mixed_columns = mixed_columns;
            job.part = part;
            job.first_block = walk.first_block;
        }
        shared_.job_full[at_.stage].arrive();
        at_.advance();
    }

    /// Marks the starts of the blocks [first, end) but the first one, as far as they lie in the
    /// kRows rows from `row` on.
    template <int kRows>
    __device__ void mark(uint32_t* starts, int first, int end, int row) const {
        for (int block = first + 1 + lane_; block < end; block += 32) {
            const int at = args_.block_starts[block] - row;
            if (at > 0 && at < kRows) atomicOr(starts + at / 32, 1u << at % 32);
        }
    }

    const ScoresArguments& args_;
    ScoresShared<Traits>& shared_;
    const int lane_;
    RingPosition<2> at_;
};

/// Run by one thread: copies the keys of every key head, and the queries of the heads of its group.
template <typename Traits>
__device__ void copy_tiles(const HopperScoresArguments& args, ScoresShared<Traits>& shared) {
    using Element = typename Traits::Element;
    constexpr int kMmaKeys = Traits::kMmaKeys, kHeadDim = Traits::kHeadDim;
    constexpr int kElementBytes = sizeof(Element);
    const int heads = args.plan.heads, key_heads = args.plan.key_heads;
    const int group = heads / key_heads;
    RingPosition<2> job_at;
    RingPosition<Traits::kKeyStages> keys_at;
    RingPosition<Traits::kQueryStages> queries_at;
    for (;;) {
        shared.job_full[job_at.stage].wait(job_at.parity);
        const Job& job = shared.jobs[job_at.stage];
        const int query_row = job.query_row, key_row = job.key_row, key_halves = job.key_halves;
        shared.job_empty[job_at.stage].arrive();
        job_at.advance();
        if (key_halves == 0) return;
        int head = 0;
        for (int key_head = 0; key_head < key_heads; ++key_head) {
            Barrier& keys_full = shared.keys_full[keys_at.stage];
            shared.keys_empty[keys_at.stage].wait(keys_at.parity ^ 1);
            keys_full.arrive_expecting(key_halves * kMmaKeys * kHeadDim * kElementBytes);
            for (int half = 0; half < key_halves; ++half) {
                CUTE_UNROLL
                for (int column = 0; column < kHeadDim; column += kCopyColumns) {
                    copy_box(args.k, keys_full,
                             shared.keys[keys_at.stage][half] + column * kMmaKeys, column, key_head,
                             key_row + half * kMmaKeys);
                }
            }
            keys_at.advance();
            for (const int end = head + group; head < end; ++head) {
                Barrier& queries_full = shared.queries_full[queries_at.stage];
                shared.queries_empty[queries_at.stage].wait(queries_at.parity ^ 1);
                queries_full.arrive_expecting(kQueryRows * kHeadDim * kElementBytes);
                CUTE_UNROLL
                for (int column = 0; column < kHeadDim; column += kCopyColumns) {
                    copy_box(args.q, queries_full,
                             shared.queries[queries_at.stage] + column * kQueryRows, column, head,
                             query_row);
                }
                queries_at.advance();
            }
        }
    }
}

/// Run by one warp: for every block of keys, the sum of the maxima over the query blocks of a part,
/// in their order.
template <typename Traits>
__device__ void sum_cells(const ScoresArguments& args, ScoresShared<Traits>& shared) {
    constexpr int kLaneBlocks = kKeyRows / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    RingPosition<2> job_at, cells_at;
    float totals[kLaneBlocks] = {};
    for (;;) {
        shared.job_full[job_at.stage].wait(job_at.parity);
        const Job& job = shared.jobs[job_at.stage];
        const int num_queries = job.num_queries, num_keys = job.num_keys;
        const int key_halves = job.key_halves, part = job.part, first_block = job.first_block;
        const bool last_of_tile = job.last_of_tile, last_of_item = job.last_of_item;
        shared.job_empty[job_at.stage].arrive();
        job_at.advance();
        if (key_halves == 0) return;
        if (last_of_tile) {
            const int at_a_time = min(num_queries, kCells / num_keys);
            for (int query = 0; query < num_queries; query += at_a_time) {
                const int rows = min(at_a_time, num_queries - query);
                int* cells = shared.cells[cells_at.stage];
                shared.cells_full[cells_at.stage].wait(cells_at.parity);
                CUTE_UNROLL
                for (int i = 0; i < kLaneBlocks; ++i) {
                    for (int n = lane + 32 * i; n < rows * num_keys; n += num_keys) {
                        if (lane + 32 * i >= num_keys) break;
                        totals[i] += __int_as_float(cells[n]);
                        cells[n] = 0;
                    }
                }
                shared.cells_empty[cells_at.stage].arrive();
                cells_at.advance();
            }
        }
        if (last_of_item) {
            float* sums = args.scratch.parts + int64_t{part} * args.num_blocks + first_block;
            CUTE_UNROLL
            for (int i = 0; i < kLaneBlocks; ++i) {
                if (lane + 32 * i < num_keys) sums[lane + 32 * i] = totals[i];
                totals[i] = 0;
            }
        }
    }
}

}  // namespace lemo::cuda::block_scores::hopper
