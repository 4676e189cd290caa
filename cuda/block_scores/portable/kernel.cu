// The portable kernel of block_scores: one pass over tiles of 128 queries x 256 keys, summed over
// heads in registers.
//
// A thread block takes a tile of keys and a run of tiles of queries. Each of its eight warps keeps
// the fragments of 32 keys of one key head in registers while the queries of the head's group pass
// by in shared memory, so that shared memory is read for one operand only.
#include "block_scores/portable/kernel.h"

#include "common/async_copy.h"
#include "common/launch.h"
#include "common/shared_tile.h"
#include "common/vector.h"
#include "common/warp_mma.h"

namespace lemo::cuda::block_scores::portable {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kWarpKeys = kKeyRows / kWarps;
// Shared memory is a ring of units, each of 64 rows of one head: four units of keys, then two for
// each query head of the group. Six units of head size 128 fit into the 99 KiB that a block has
// on every GPU of this tier; while one is used, the next five are in flight, which takes in the
// keys of the next head and its first queries.
constexpr int kUnitRows = 64;
constexpr int kKeyUnits = kKeyRows / kUnitRows;
constexpr int kQueryUnits = kQueryRows / kUnitRows;
constexpr int kStages = 6;
// Maxima of pairs of blocks that are gathered at a time.
constexpr int kCells = 256;

static_assert(kCells >= kKeyRows && kCells >= kQueryRows, "a row of pairs must fit");
static_assert(kThreads >= kKeyRows, "a thread owns the sum of a block of keys");
static_assert(kStages == kKeyUnits + 2, "the counts of pending copies below rely on it");

/// An item, and its pairs: the one that is being used and the one after it. They lie in shared
/// memory, where the first thread leaves them, as the registers of all are full of sums.
struct SharedWalk : PairWalk {
    Item item;
    Pair pairs[2];

    __device__ void take(const ScoresArguments& args) {
        item = take_item(args);
        if (item.key_tile < 0) return;
        pairs[0] = enter(args, item);
        pairs[1] = after(args, pairs[0]);
    }
};

/// Fills the ring, in the order in which the units are used.
template <typename T, int kHeadDim>
struct Producer {
    static constexpr int kRowBytes = kHeadDim * 2;
    static constexpr int kUnitBytes = kUnitRows * kRowBytes;
    static constexpr int kPieces = kRowBytes / 16;        // of a row
    static constexpr int kPassRows = kThreads / kPieces;  // that all threads copy at a time

    int pair = 0, key_head = 0, unit = 0, stage = 0;

    /// Copies one unit, or closes an empty group where there is none left: the consumer counts.
    __device__ __forceinline__ void issue(const ScoresArguments& args, const SharedWalk& walk,
                                          unsigned char* ring) {
        const Pair rows = walk.pairs[pair % 2];
        if (rows.query_tile >= 0) {
            copy(args, rows, walk.key_end, ring);
            if (++unit == kKeyUnits + kQueryUnits * (args.heads / args.key_heads)) {
                unit = 0;
                if (++key_head == args.key_heads) {
                    key_head = 0;
                    ++pair;
                }
            }
        }
        commit_copies();
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }

private:
    __device__ __forceinline__ void copy(const ScoresArguments& args, const Pair& rows, int key_end,
                                         unsigned char* ring) const {
        const bool is_key = unit < kKeyUnits;
        const int query_unit = unit - kKeyUnits;
        const int heads = is_key ? args.key_heads : args.heads;
        const int head =
            is_key ? key_head : key_head * (args.heads / args.key_heads) + query_unit / kQueryUnits;
        const int first = is_key ? rows.key_row + unit * kUnitRows
                                 : rows.query_row + query_unit % kQueryUnits * kUnitRows;
        const int end = is_key ? key_end : rows.query_end;
        const T* base = static_cast<const T*>(is_key ? args.k : args.q);

        const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
        const bool in_head = piece * 8 < args.head_dim;
        const int row_elements = heads * args.head_dim;
        const T* from =
            base + int64_t{first + row} * row_elements + head * args.head_dim + piece * 8;
        // A pass is a multiple of eight rows, so the swizzle is the same in each.
        static_assert(kPassRows % 8 == 0, "the swizzle repeats every eight rows");
        unsigned char* to = ring + stage * kUnitBytes + swizzled<kRowBytes>(row, piece);
        CUTLASS_PRAGMA_UNROLL
        for (int pass = 0; pass < kUnitRows / kPassRows; ++pass) {
            // Zeros behind the end of the head, and behind the tile's, where `from` may lie behind
            // the array.
            const bool valid = in_head && first + row + pass * kPassRows < end;
            copy_async_if(valid, to + pass * kPassRows * kRowBytes, valid ? from : base);
            from += kPassRows * row_elements;
        }
    }
};

/// A warp's sums over heads: 128 queries x 32 keys, as 8 x 4 results of an mma.
using HeadSums = float[kQueryRows / 16][kWarpKeys / 8][4];

/// Its fragments of one key head, for each step of 16 elements.
template <int kHeadDim>
using Keys = uint32_t[kHeadDim / 16][kWarpKeys / 8][2];

/// The fragments of the warp's keys, from the four units that start at `stage`.
template <int kHeadDim>
__device__ __forceinline__ void load_keys(const unsigned char* ring, int stage, int warp, int lane,
                                          Keys<kHeadDim>& keys) {
    const auto reader = column_reader<kHeadDim * 2>(warp * kWarpKeys % kUnitRows, lane);
    const unsigned char* unit =
        ring + (stage + warp * kWarpKeys / kUnitRows) % kStages * (kUnitRows * kHeadDim * 2);
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < kHeadDim / 16; ++step) {
        CUTLASS_PRAGMA_UNROLL
        for (int n = 0; n < kWarpKeys / 8; n += 2) {
            uint32_t both[4];
            load_matrices(both, unit + reader.offset(step, n * 8));
            keys[step][n][0] = both[0], keys[step][n][1] = both[1];
            keys[step][n + 1][0] = both[2], keys[step][n + 1][1] = both[3];
        }
    }
}

/// Adds max(q . k, 0) of one unit of queries.
template <typename T, int kHeadDim, int kUnit>
__device__ __forceinline__ void add_positive(const unsigned char* unit,
                                             const FragmentReader<kHeadDim * 2>& reader,
                                             const Keys<kHeadDim>& keys, HeadSums& sums) {
    constexpr int kSteps = kHeadDim / 16, kSlices = kUnitRows / 16;
    // The next step's queries are on their way while this one's are used.
    uint32_t queries[2][4];
    load_matrices(queries[0], unit + reader.offset(0, 0));
    CUTLASS_PRAGMA_UNROLL
    for (int slice = 0; slice < kSlices; ++slice) {
        float accumulators[kWarpKeys / 8][4] = {};
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            const int next = slice * kSteps + step + 1;
            if (next < kSlices * kSteps) {
                load_matrices(queries[next % 2],
                              unit + reader.offset(next % kSteps, next / kSteps * 16));
            }
            CUTLASS_PRAGMA_UNROLL
            for (int n = 0; n < kWarpKeys / 8; ++n) {
                warp_mma<T>(accumulators[n], queries[(next - 1) % 2], keys[step][n]);
            }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int n = 0; n < kWarpKeys / 8; ++n) {
            CUTLASS_PRAGMA_UNROLL
            for (int e = 0; e < 4; ++e) {
                sums[kUnit * kSlices + slice][n][e] += fmaxf(accumulators[n][e], 0.0f);
            }
        }
    }
}

/// Zeroes the sums that the mask hides, and those of keys behind the tile.
__device__ __forceinline__ void hide(const Pair& pair, int key_end, int warp, int lane,
                                     HeadSums& sums) {
    const bool below_diagonal = pair.query_row >= pair.key_row + kKeyRows;
    if (below_diagonal && pair.key_row + kKeyRows <= key_end) return;
    const int first_row = pair.query_row + lane / 4;
    const int first_key = pair.key_row + warp * kWarpKeys + lane % 4 * 2;
    CUTLASS_PRAGMA_UNROLL
    for (int slice = 0; slice < kQueryRows / 16; ++slice) {
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < 4; ++e) {
            const int end = min(first_row + slice * 16 + e / 2 * 8, key_end);
            CUTLASS_PRAGMA_UNROLL
            for (int n = 0; n < kWarpKeys / 8; ++n) {
                if (first_key + n * 8 + e % 2 >= end) sums[slice][n][e] = 0.0f;
            }
        }
    }
}

/// Raises the cells of one block of queries, rows [first, end) of the tile, by this warp's maxima.
/// The sums are not negative, so their order is that of their bits, and a maximum is the same in
/// whatever order it is taken.
__device__ __forceinline__ void raise_cells(const HeadSums& sums, int first, int end,
                                            const uint8_t* column_block, int lane, int* cells) {
    float best[kWarpKeys / 4] = {};  // of the lane's columns
    CUTLASS_PRAGMA_UNROLL
    for (int slice = 0; slice < kQueryRows / 16; ++slice) {
        if (slice * 16 >= end || slice * 16 + 16 <= first) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = slice * 16 + half * 8 + lane / 4;
            const bool in_block = row >= first && row < end;
            CUTLASS_PRAGMA_UNROLL
            for (int c = 0; c < kWarpKeys / 4; ++c) {
                const float value = sums[slice][c / 2][half * 2 + c % 2];
                best[c] = fmaxf(best[c], in_block ? value : 0.0f);
            }
        }
    }
    if (column_block[0] == column_block[kWarpKeys - 1]) {
        float value = best[0];
        CUTLASS_PRAGMA_UNROLL
        for (int c = 1; c < kWarpKeys / 4; ++c) value = fmaxf(value, best[c]);
        const unsigned bits = __reduce_max_sync(0xffffffffu, __float_as_uint(value));
        if (lane == 0) atomicMax(cells + column_block[0], static_cast<int>(bits));
        return;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < kWarpKeys / 4; ++c) {
        float value = best[c];
        CUTLASS_PRAGMA_UNROLL
        for (int offset = 4; offset < 32; offset *= 2) {
            value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
        }
        const int column = c / 2 * 8 + lane * 2 + c % 2;
        if (lane < 4) atomicMax(cells + column_block[column], __float_as_int(value));
    }
}

template <typename T, int kHeadDim>
__global__ void
__launch_bounds__(kThreads, 1) portable_scores_kernel(ScoresArguments args) {
    using Units = Producer<T, kHeadDim>;
    extern __shared__ __align__(1024) unsigned char ring[];
    __shared__ SharedWalk walk;
    __shared__ int cells[kCells];               // I[m, n] of some pairs of blocks, as bits
    __shared__ uint8_t column_block[kKeyRows];  // block of each key, counted from the tile's first

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto query_reader = row_reader<kHeadDim * 2>(0, lane);
    const int32_t* starts = args.block_starts;
    const int group = args.heads / args.key_heads;
    for (int i = threadIdx.x; i < kCells; i += kThreads) cells[i] = 0;

    for (;;) {
        __syncthreads();  // nothing of the last item is needed any more
        if (threadIdx.x == 0) walk.take(args);
        __syncthreads();
        if (walk.item.key_tile < 0) return;
        {
            // Keys behind the tile, whose sums are 0, count as the last block's, so that equal ends
            // of a run of columns mean one block. A tile of more than kKeyRows rows is one block.
            const int row = walk.key_first + static_cast<int>(threadIdx.x);
            const int block = count_up_to(starts + walk.first_block, walk.num_keys, row) - 1;
            column_block[threadIdx.x] = static_cast<uint8_t>(block);
        }
        float total = 0;  // of block threadIdx.x of the tile of keys

        Units units;
        CUTLASS_PRAGMA_NO_UNROLL
        for (int i = 0; i < kStages - 1; ++i) units.issue(args, walk, ring);
        int stage = 0;
        const auto next_unit = [&] {
            const unsigned char* unit = ring + stage * Units::kUnitBytes;
            stage = stage + 1 == kStages ? 0 : stage + 1;
            return unit;
        };

        for (int p = 0; walk.pairs[p % 2].query_tile >= 0; ++p) {
            HeadSums sums = {};
            for (int key_head = 0; key_head < args.key_heads; ++key_head) {
                // In flight: the four units of keys and one of queries. The barrier also frees the
                // unit before them.
                wait_copies<1>();
                __syncthreads();
                units.issue(args, walk, ring);
                // All have left the pair before this one. The units never run so far ahead that
                // they need the one after it before the next barrier.
                if (threadIdx.x == 0 && key_head == 0 && p > 0) {
                    walk.pairs[(p + 1) % 2] = walk.after(args, walk.pairs[p % 2]);
                }
                Keys<kHeadDim> keys;
                load_keys<kHeadDim>(ring, stage, warp, lane, keys);
                stage = (stage + kKeyUnits) % kStages;
                for (int head = 0; head < group; ++head) {
                    // In flight: two units of queries at first, later all but the one in use. All
                    // warps have read their keys after the first barrier.
                    if (head == 0) {
                        wait_copies<1>();
                    } else {
                        wait_copies<kStages - 2>();
                    }
                    __syncthreads();
                    CUTLASS_PRAGMA_NO_UNROLL
                    for (int i = head == 0 ? kKeyUnits : 1; i > 0; --i) {
                        units.issue(args, walk, ring);
                    }
                    add_positive<T, kHeadDim, 0>(next_unit(), query_reader, keys, sums);
                    wait_copies<kStages - 2>();
                    __syncthreads();
                    units.issue(args, walk, ring);
                    add_positive<T, kHeadDim, 1>(next_unit(), query_reader, keys, sums);
                }
            }

            const Pair pair = walk.pairs[p % 2];
            const int num_keys = walk.num_keys;
            hide(pair, walk.key_end, warp, lane, sums);
            const int first_query = args.scratch.query_first[pair.query_tile];
            const int end_query = args.scratch.query_first[pair.query_tile + 1];
            // Where a tile takes several pairs, one of its sides is a single block, and all its
            // cells fit: they gather maxima until the last pair.
            const int at_a_time = min(end_query - first_query, kCells / num_keys);
            for (int query = first_query; query < end_query; query += at_a_time) {
                const int end = min(query + at_a_time, end_query);
                __syncthreads();  // cells are zero, or hold the maxima of earlier pairs
                for (int m = query; m < end; ++m) {
                    raise_cells(sums, starts[m] - pair.query_row, starts[m + 1] - pair.query_row,
                                column_block + warp * kWarpKeys, lane,
                                cells + (m - query) * num_keys);
                }
                __syncthreads();
                if (walk.last_of_tile(pair) && threadIdx.x < num_keys) {
                    for (int i = threadIdx.x; i < (end - query) * num_keys; i += num_keys) {
                        total += __int_as_float(cells[i]);
                        cells[i] = 0;
                    }
                }
            }
        }
        if (threadIdx.x < walk.num_keys) {
            const int64_t row = int64_t{walk.item.part} * args.num_blocks;
            args.scratch.parts[row + walk.first_block + threadIdx.x] = total;
        }
    }
}

template <typename T, int kHeadDim>
void launch_kernel(const ScoresArguments& args, cudaStream_t stream) {
    const size_t bytes = kStages * Producer<T, kHeadDim>::kUnitBytes;
    const auto kernel = portable_scores_kernel<T, kHeadDim>;
    reserve_shared_memory("block_scores", kernel, bytes);
    kernel<<<num_multiprocessors("block_scores"), kThreads, bytes, stream>>>(args);
    check_launch("block_scores");
}

}  // namespace

void launch(const ScoresArguments& args, DType dtype, cudaStream_t stream) {
    dispatch_half(dtype, [&]<typename T>(T) {
        if (args.head_dim <= 64) {
            launch_kernel<T, 64>(args, stream);
        } else {
            launch_kernel<T, 128>(args, stream);
        }
    });
}

}  // namespace lemo::cuda::block_scores::portable
