// The consumer warpgroups: mmas of queries and keys, and the maxima of their sums over pairs of
// blocks.
#pragma once

#include "block_scores/hopper/traits.h"

namespace lemo::cuda::block_scores::hopper {

/// A thread's sums over heads, of each half of the keys.
///
/// Lane l of warp w holds rows 16 w + l / 4 and the eighth one after it, of each group of eight
/// columns the two from 2 (l % 4) on: element 4 g + 2 r + c is row r of these two and column c of
/// those of group g.
template <typename Traits>
using HeadSums = float[2][Traits::kMmaKeys / 2];

template <typename Traits>
inline constexpr int kGroups = Traits::kMmaKeys / 8;  // of columns, in each half

/// Raises a cell by the maximum over a warp. The sums are not negative, so their order is that of
/// their bits, and a maximum is the same in whatever order it is taken.
__device__ __forceinline__ void raise_cell(int* cell, int value, int lane) {
    value = __reduce_max_sync(0xffffffffu, value);
    if (lane == 0) atomicMax(cell, value);
}

/// The rows of one warp in a job, and the blocks that they belong to.
struct WarpRows {
    int lane;
    int first;        // row of the pair
    int first_block;  // counted from the first block of the pair
    uint32_t starts;  // bit i: a block begins at the warp's row i, i > 0
    const Job& job;

    __device__ WarpRows(const Job& job, int first)
        : lane(static_cast<int>(threadIdx.x) % 32), first(first), job(job) {
        const uint32_t word = job.query_starts[first / 32] >> first % 32;
        starts = word & 0xfffeu;
        first_block = word & 1;
        for (int row = 0; row < first; row += 32) {
            const uint32_t before = first - row < 32 ? (1u << (first - row)) - 1 : 0xffffffffu;
            first_block += __popc(job.query_starts[row / 32] & before);
        }
    }

    __device__ int end_block() const { return first_block + __popc(starts) + 1; }

    /// Block of row r (0 or 1) of this lane.
    __device__ int block(int r) const {
        return first_block + __popc(starts & ((2u << (lane / 4 + 8 * r)) - 1));
    }
};

/// Zeroes the sums that the mask hides, and those of rows and keys behind the tiles.
template <typename Traits>
__device__ __forceinline__ void hide(const WarpRows& rows, HeadSums<Traits>& sums) {
    const Job& job = rows.job;
    const int warp_row = job.query_row + rows.first;
    const bool below_diagonal = warp_row >= job.key_row + kKeyRows;
    if (below_diagonal && job.key_row + kKeyRows <= job.key_end && warp_row + 16 <= job.query_end) {
        return;
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = warp_row + rows.lane / 4 + 8 * r;
        // Columns from here on are hidden, relative to the lane's first one.
        const int end =
            (row < job.query_end ? min(row, job.key_end) : 0) - job.key_row - rows.lane % 4 * 2;
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
            CUTE_UNROLL
            for (int i = 0; i < kGroups<Traits> * 2; ++i) {
                const int column = half * Traits::kMmaKeys + i / 2 * 8 + i % 2;
                if (column >= end) sums[half][i / 2 * 4 + r * 2 + i % 2] = 0.0f;
            }
        }
    }
}

/// Raises a row of cells where all rows of the warp belong to one block, and blocks of keys begin
/// at multiples of eight columns.
template <typename Traits>
__device__ __forceinline__ void raise_whole_groups(const WarpRows& rows,
                                                   const HeadSums<Traits>& sums, int* cell) {
    int best = 0;
    const auto flush = [&] {
        raise_cell(cell++, best, rows.lane);
        best = 0;
    };
    const auto take = [&](const float* group) __attribute__((always_inline)) {
        int bits[4];
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) bits[i] = __float_as_int(group[i]);
        best = __vimax3_s32(best, __vimax3_s32(bits[0], bits[1], bits[2]), bits[3]);
    };
    // Most often no block begins within 32 columns.
    CUTE_UNROLL
    for (int word = 0; word < kKeyRows / 32; ++word) {
        const uint32_t starts = rows.job.key_starts[word];
        const float* groups = sums[word / 4] + word % 4 * 16;
        if (starts <= 1) {
            if (starts == 1) flush();
            CUTE_UNROLL
            for (int g = 0; g < 4; ++g) take(groups + 4 * g);
        } else {
            CUTE_UNROLL
            for (int g = 0; g < 4; ++g) {
                if (starts >> 8 * g & 1) flush();
                take(groups + 4 * g);
            }
        }
    }
    flush();
}

/// Raises a row of cells by those rows of the warp that belong to block `block` of queries.
template <typename Traits>
__device__ __forceinline__ void raise_row(const WarpRows& rows, const HeadSums<Traits>& sums,
                                          int block, int* cell) {
    const bool valid[2] = {rows.block(0) == block, rows.block(1) == block};
    int best = 0;
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
        CUTE_UNROLL
        for (int g = 0; g < kGroups<Traits>; ++g) {
            const int group = half * kGroups<Traits> + g;
            const uint32_t starts = rows.job.key_starts[group / 4] >> group % 4 * 8 & 0xffu;
            int column[2];
            CUTE_UNROLL
            for (int c = 0; c < 2; ++c) {
                column[c] = max(valid[0] ? __float_as_int(sums[half][4 * g + c]) : 0,
                                valid[1] ? __float_as_int(sums[half][4 * g + 2 + c]) : 0);
            }
            if (starts != 0) {
                raise_cell(cell, best, rows.lane);
                best = 0;
            }
            if (starts <= 1) {
                best = __vimax3_s32(best, column[0], column[1]);
                cell += starts;
                continue;
            }
            CUTE_UNROLL
            for (int c = 0; c < 2; ++c) {
                CUTE_UNROLL
                for (int offset = 4; offset < 32; offset *= 2) {
                    column[c] = max(column[c], __shfl_xor_sync(0xffffffffu, column[c], offset));
                }
                const uint32_t up_to = (2u << (rows.lane % 4 * 2 + c)) - 1;
                if (rows.lane < 4) atomicMax(cell + __popc(starts & up_to), column[c]);
            }
            cell += __popc(starts);
        }
    }
    raise_cell(cell, best, rows.lane);
}

/// Gathers the maxima of a job in the cells.
template <typename Traits>
__device__ __forceinline__ void raise_cells(const WarpRows& rows, const HeadSums<Traits>& sums,
                                            RingPosition<2>& at, ScoresShared<Traits>& shared) {
    const Job& job = rows.job;
    const int num_keys = job.num_keys, num_queries = job.num_queries;
    // Where a tile of queries takes several jobs, one of its sides is a single block, and all its
    // cells fit: they gather maxima until the last job.
    const int at_a_time = min(num_queries, kCells / num_keys);
    for (int query = 0; query < num_queries; query += at_a_time) {
        if (job.first_of_tile) shared.cells_empty[at.stage].wait(at.parity ^ 1);
        int* cells = shared.cells[at.stage];
        const int end = min(query + at_a_time, rows.end_block());
        for (int block = max(query, rows.first_block); block < end; ++block) {
            int* row_cells = cells + (block - query) * num_keys;
            if (rows.starts == 0 && !job.mixed_columns) {
                raise_whole_groups<Traits>(rows, sums, row_cells);
            } else {
                raise_row<Traits>(rows, sums, block, row_cells);
            }
        }
        if (job.last_of_tile) {
            shared.cells_full[at.stage].arrive();
            at.advance();
        }
    }
}

/// The mmas of this warpgroup, which alternate with the other one's: while one adds, the other
/// multiplies.
template <typename Traits>
class ScoresMma {
public:
    using Accumulators = decltype(cute::partition_fragment_C(
        typename Traits::Mma{}, cute::Shape<cute::Int<kQueryRows>, cute::Int<Traits::kMmaKeys>>{}));

    __device__ ScoresMma(ScoresShared<Traits>& shared, int thread)
        : shared_(shared), slice_(typename Traits::Mma{}.get_slice(thread)), lane_(thread % 32),
          warpgroup_(thread / kWarpgroupThreads),
          // No warp arrives for the first mma of the first warpgroup: it waits for the phase
          // before.
          parity_(warpgroup_ == 0 ? 1 : 0) {}

    /// accumulators = queries keys^T, of the queries of this warpgroup and half of the keys.
    __device__ __forceinline__ void multiply(int query_stage, int key_stage, int half,
                                             Accumulators& accumulators) {
        using namespace cute;
        constexpr int kSteps = Traits::kHeadDim / 16;
        // The addresses are worked out anew for every mma, as sums fill the registers.
        asm volatile("" : "+r"(query_stage), "+r"(key_stage));
        const auto queries = slice_.partition_fragment_A(make_tensor(
            make_smem_ptr(shared_.queries[query_stage]), typename Traits::QueryLayout{}));
        const auto keys = slice_.partition_fragment_B(make_tensor(
            make_smem_ptr(shared_.keys[key_stage][half]), typename Traits::KeyLayout{}));
        typename Traits::Mma mma;
        mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;
        shared_.scheduler[warpgroup_].wait(parity_);
        parity_ ^= 1;
        warpgroup_fence_operand(accumulators);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            // Early, so that the other warpgroup is ready when this mma ends.
            if (step == kSteps * 3 / 4 && lane_ == 0) shared_.scheduler[warpgroup_ ^ 1].arrive();
            gemm(mma, queries(_, _, step), keys(_, _, step), accumulators);
            mma.accumulate_ = SM90::GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
        warpgroup_fence_operand(accumulators);
        wait_mmas<0>();
        warpgroup_fence_operand(accumulators);  // lest the compiler read it before
    }

private:
    ScoresShared<Traits>& shared_;
    decltype(typename Traits::Mma{}.get_slice(0)) slice_;
    int lane_, warpgroup_;
    uint32_t parity_;
};

/// Run by the consumer warps; `thread` counts from their first one.
template <typename Traits>
__device__ void consume_scores(const ScoresArguments& args, ScoresShared<Traits>& shared,
                               int thread) {
    const int group = args.heads / args.key_heads;

    ScoresMma<Traits> mma(shared, thread);
    typename ScoresMma<Traits>::Accumulators accumulators;
    RingPosition<2> job_at, cells_at;
    RingPosition<Traits::kKeyStages> keys_at;
    RingPosition<Traits::kQueryStages> queries_at;
    for (;;) {
        shared.job_full[job_at.stage].wait(job_at.parity);
        const Job& job = shared.jobs[job_at.stage];
        const int key_halves = job.key_halves;
        if (key_halves == 0) return;

        HeadSums<Traits> sums = {};
        for (int key_head = 0; key_head < args.key_heads; ++key_head) {
            shared.keys_full[keys_at.stage].wait(keys_at.parity);
            for (int head = 0; head < group; ++head) {
                shared.queries_full[queries_at.stage].wait(queries_at.parity);
                const auto multiply = [&](int half) {
                    mma.multiply(queries_at.stage, keys_at.stage, half, accumulators);
                    if (half + 1 < key_halves) return;
                    shared.queries_empty[queries_at.stage].arrive_warp();
                    if (head == group - 1) shared.keys_empty[keys_at.stage].arrive_warp();
                };
                const auto add = [&](float (&half_sums)[Traits::kMmaKeys / 2]) {
                    CUTE_UNROLL
                    for (int i = 0; i < Traits::kMmaKeys / 2; ++i) {
                        half_sums[i] += fmaxf(accumulators(i), 0.0f);
                    }
                };
                multiply(0);
                add(sums[0]);
                if (key_halves == 2) {
                    multiply(1);
                    add(sums[1]);
                }
                queries_at.advance();
            }
            keys_at.advance();
        }

        const WarpRows rows(job, thread / 32 * 16);
        hide<Traits>(rows, sums);
        raise_cells<Traits>(rows, sums, cells_at, shared);
        __syncwarp();  // the next job's mmas begin with whole warps
        shared.job_empty[job_at.stage].arrive();
        job_at.advance();
    }
}

}  // namespace lemo::cuda::block_scores::hopper
