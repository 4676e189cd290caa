// block_scores on CUDA: one pass over tiles of 128 queries x 256 keys, summed over heads in
// registers; nothing of size T x T, nor B x B, exists.
//
// A thread block takes a tile of keys and a run of tiles of queries. Each of its eight warps keeps
// the fragments of 32 keys of one key head in registers while the queries of the head's group pass
// by in shared memory, so that shared memory is read for one operand only.
#include "lemo/block_scores.h"

#include <algorithm>

#include "common/block_tiles.h"
#include "common/launch.h"
#include "common/shared_tile.h"
#include "common/tensor_core.h"
#include "common/vector.h"

namespace lemo {
namespace {

constexpr int kQueryRows = BlockScoresCut::kQueryRows;
constexpr int kKeyRows = BlockScoresCut::kKeyRows;
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
// Tiles of keys that are worked on side by side, so that they and the queries they share stay in
// the L2 cache.
constexpr int kTileGroup = 32;

static_assert(kCells >= kKeyRows && kCells >= kQueryRows, "a row of pairs must fit");
static_assert(kThreads >= kKeyRows, "a thread owns the sum of a block of keys");
static_assert(kStages == kKeyUnits + 2, "the counts of pending copies below rely on it");

struct KeyTile {
    int32_t first_block, end_block;
    int32_t first_query_tile, end_query_tile;
};

/// What the kernels hand to each other; every block of the op has a place in each array.
struct Workspace {
    int32_t* num_key_tiles;
    int32_t* next_item;
    KeyTile* key_tiles;
    int32_t* key_first;    // first block of each tile of keys
    int32_t* query_first;  // first block of each tile of queries
    int2* blocks;          // number of parts of the sum, number of terms of the mean
    float* parts;          // [parts, B] sums of I[m, n] over the m of a part

    Workspace(void* scratch, int64_t blocks_of_op) {
        auto* next = static_cast<int32_t*>(scratch);
        num_key_tiles = next;
        next_item = next + 1;
        key_tiles = reinterpret_cast<KeyTile*>(next += 4);
        blocks = reinterpret_cast<int2*>(next += 4 * blocks_of_op);
        key_first = next += 2 * blocks_of_op;
        query_first = next += blocks_of_op + 1;
        parts = reinterpret_cast<float*>(next += blocks_of_op + 1);
    }
};

struct Arguments {
    const void* q;
    const void* k;
    const int32_t* block_starts;
    const int32_t* cu_blocks;
    int num_sequences, num_blocks;
    int heads, key_heads, head_dim;
    int tiles_per_part, max_parts;
    Workspace workspace;
};

/// Parts that the sums of a tile of keys are cut into. Cuts lie at multiples of tiles_per_part, so
/// that neighbouring tiles of keys read the same queries at about the same time.
__device__ __forceinline__ int num_parts(const KeyTile& tile, int tiles_per_part) {
    return (tile.end_query_tile - 1) / tiles_per_part - tile.first_query_tile / tiles_per_part + 1;
}

/// One thread block: cuts blocks into tiles.
__global__ void __launch_bounds__(kThreads) plan_kernel(Arguments args) {
    __shared__ int num_key_tiles, num_query_tiles;
    const Workspace& work = args.workspace;
    // Two warps, so that one does not wait for the other.
    if (threadIdx.x == 0) {
        num_key_tiles = cuda::cut_tiles(args.block_starts, args.cu_blocks, args.num_sequences,
                                        kKeyRows, work.key_first);
        *work.num_key_tiles = num_key_tiles;
        *work.next_item = 0;
    } else if (threadIdx.x == 32) {
        num_query_tiles = cuda::cut_tiles(args.block_starts, args.cu_blocks, args.num_sequences,
                                          kQueryRows, work.query_first);
    }
    __syncthreads();
    for (int t = threadIdx.x; t < num_key_tiles; t += kThreads) {
        KeyTile tile{work.key_first[t], work.key_first[t + 1], 0, 0};
        const int sequence =
            cuda::count_up_to(args.cu_blocks, args.num_sequences + 1, tile.first_block) - 1;
        const int end = args.cu_blocks[sequence + 1];
        const auto tile_of = [&](int block) {
            return cuda::count_up_to(work.query_first, num_query_tiles, block) - 1;
        };
        tile.first_query_tile = tile_of(tile.first_block);
        tile.end_query_tile = tile_of(end - 1) + 1;
        work.key_tiles[t] = tile;
        const int parts = num_parts(tile, args.tiles_per_part);
        for (int n = tile.first_block; n < tile.end_block; ++n) {
            work.blocks[n] = int2{parts, end - n};
        }
    }
}

/// One tile of keys and one part of its queries.
struct Item {
    int key_tile;  // -1: no more items
    int part;
};

__device__ Item take_item(const Arguments& args) {
    const Workspace& work = args.workspace;
    const int num_tiles = *work.num_key_tiles;
    const int in_group = kTileGroup * args.max_parts;
    const int num_items = ceil_div(num_tiles, kTileGroup) * in_group;
    for (;;) {
        const int i = atomicAdd(work.next_item, 1);
        if (i >= num_items) return {-1, 0};
        const Item item{i / in_group * kTileGroup + i % kTileGroup, i % in_group / kTileGroup};
        if (item.key_tile >= num_tiles) continue;
        if (item.part < num_parts(work.key_tiles[item.key_tile], args.tiles_per_part)) return item;
    }
}

/// One product of up to kQueryRows queries and kKeyRows keys.
struct alignas(16) Pair {
    int query_tile;  // -1 after the last pair of an item
    int query_row, query_end, key_row;
};

/// An item, and its pairs: the one that is being used and the one after it. They lie in shared
/// memory, where the first thread leaves them, as the registers of all are full of sums.
struct Walk {
    Item item;
    int first_block, num_keys;       // blocks of keys
    int key_first, key_end;          // their rows
    int end_query_tile;
    Pair pairs[2];

    __device__ void enter(const Arguments& args, const Item& next) {
        item = next;
        if (item.key_tile < 0) return;
        const KeyTile tile = args.workspace.key_tiles[item.key_tile];
        const int step = args.tiles_per_part, part = tile.first_query_tile / step + item.part;
        first_block = tile.first_block;
        num_keys = tile.end_block - tile.first_block;
        key_first = args.block_starts[tile.first_block];
        key_end = args.block_starts[tile.end_block];
        end_query_tile = min((part + 1) * step, tile.end_query_tile);
        pairs[0] = tile_of(args, max(part * step, tile.first_query_tile));
        pairs[1] = after(args, pairs[0]);
    }

    /// Tiles of more rows than fit into a pair are single blocks.
    __device__ Pair after(const Arguments& args, Pair pair) const {
        if (pair.query_tile < 0) return pair;
        pair.key_row += kKeyRows;
        if (pair.key_row < key_end) return pair;
        pair.key_row = key_first;
        pair.query_row += kQueryRows;
        if (pair.query_row < pair.query_end) return pair;
        return tile_of(args, pair.query_tile + 1);
    }

    __device__ __forceinline__ bool last_of_tile(const Pair& pair) const {
        return pair.query_row + kQueryRows >= pair.query_end && pair.key_row + kKeyRows >= key_end;
    }

private:
    __device__ Pair tile_of(const Arguments& args, int tile) const {
        if (tile >= end_query_tile) return {-1, 0, 0, 0};
        const int32_t* first = args.workspace.query_first + tile;
        return {tile, args.block_starts[first[0]], args.block_starts[first[1]], key_first};
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
    __device__ __forceinline__ void issue(const Arguments& args, const Walk& walk,
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
        cuda::commit_copies();
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }

private:
    __device__ __forceinline__ void copy(const Arguments& args, const Pair& rows, int key_end,
                                         unsigned char* ring) const {
        const bool is_key = unit < kKeyUnits;
        const int query_unit = unit - kKeyUnits;
        const int heads = is_key ? args.key_heads : args.heads;
        const int head = is_key ? key_head
                                : key_head * (args.heads / args.key_heads) +
                                      query_unit / kQueryUnits;
        const int first = is_key ? rows.key_row + unit * kUnitRows
                                 : rows.query_row + query_unit % kQueryUnits * kUnitRows;
        const int end = is_key ? key_end : rows.query_end;
        const T* base = static_cast<const T*>(is_key ? args.k : args.q);

        const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
        const bool in_head = piece * 8 < args.head_dim;
        const int row_elements = heads * args.head_dim;
        const T* from = base + int64_t{first + row} * row_elements + head * args.head_dim +
                        piece * 8;
        // A pass is a multiple of eight rows, so the swizzle is the same in each.
        static_assert(kPassRows % 8 == 0);
        unsigned char* to = ring + stage * kUnitBytes + cuda::swizzled<kRowBytes>(row, piece);
        CUTLASS_PRAGMA_UNROLL
        for (int pass = 0; pass < kUnitRows / kPassRows; ++pass) {
            // Zeros behind the end of the head, and behind the tile's, where `from` may lie behind
            // the array.
            const bool valid = in_head && first + row + pass * kPassRows < end;
            cuda::copy_async(to + pass * kPassRows * kRowBytes, valid ? from : base, valid);
            from += kPassRows * row_elements;
        }
    }
};

/// A warp's sums over heads: 128 queries x 32 keys, as 8 x 4 products.
using Sums = float[kQueryRows / 16][kWarpKeys / 8][4];

/// Its fragments of one key head, for each step of 16 elements.
template <int kHeadDim>
using Keys = uint32_t[kHeadDim / 16][kWarpKeys / 8][2];

/// The fragments of the warp's keys, from the four units that start at `stage`.
template <int kHeadDim>
__device__ __forceinline__ void load_keys(const unsigned char* ring, int stage, int warp, int lane,
                                          Keys<kHeadDim>& keys) {
    const auto reader = cuda::column_reader<kHeadDim * 2>(warp * kWarpKeys % kUnitRows, lane);
    const unsigned char* unit =
        ring + (stage + warp * kWarpKeys / kUnitRows) % kStages * (kUnitRows * kHeadDim * 2);
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < kHeadDim / 16; ++step) {
        CUTLASS_PRAGMA_UNROLL
        for (int n = 0; n < kWarpKeys / 8; n += 2) {
            uint32_t both[4];
            cuda::load_matrices(both, unit + reader.offset(step, n * 8));
            keys[step][n][0] = both[0], keys[step][n][1] = both[1];
            keys[step][n + 1][0] = both[2], keys[step][n + 1][1] = both[3];
        }
    }
}

/// Adds max(q . k, 0) of one unit of queries.
template <typename T, int kHeadDim, int kUnit>
__device__ __forceinline__ void add_positive(const unsigned char* unit,
                                             const cuda::FragmentReader<kHeadDim * 2>& reader,
                                             const Keys<kHeadDim>& keys, Sums& sums) {
    constexpr int kSteps = kHeadDim / 16, kSlices = kUnitRows / 16;
    // The next step's queries are on their way while this one's are used.
    uint32_t queries[2][4];
    cuda::load_matrices(queries[0], unit + reader.offset(0, 0));
    CUTLASS_PRAGMA_UNROLL
    for (int slice = 0; slice < kSlices; ++slice) {
        float products[kWarpKeys / 8][4] = {};
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            const int next = slice * kSteps + step + 1;
            if (next < kSlices * kSteps) {
                cuda::load_matrices(queries[next % 2],
                                    unit + reader.offset(next % kSteps, next / kSteps * 16));
            }
            CUTLASS_PRAGMA_UNROLL
            for (int n = 0; n < kWarpKeys / 8; ++n) {
                cuda::multiply_add<T>(products[n], queries[(next - 1) % 2], keys[step][n]);
            }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int n = 0; n < kWarpKeys / 8; ++n) {
            CUTLASS_PRAGMA_UNROLL
            for (int e = 0; e < 4; ++e) {
                sums[kUnit * kSlices + slice][n][e] += fmaxf(products[n][e], 0.0f);
            }
        }
    }
}

/// Zeroes the sums that the mask hides, and those of keys behind the tile.
__device__ __forceinline__ void hide(const Pair& pair, int key_end, int warp, int lane,
                                     Sums& sums) {
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
__device__ __forceinline__ void raise_cells(const Sums& sums, int first, int end,
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
__global__ void __launch_bounds__(kThreads, 1) block_scores_kernel(Arguments args) {
    using Units = Producer<T, kHeadDim>;
    extern __shared__ __align__(1024) unsigned char ring[];
    __shared__ Walk walk;
    __shared__ int cells[kCells];               // I[m, n] of some pairs of blocks, as bits
    __shared__ uint8_t column_block[kKeyRows];  // block of each key, counted from the tile's first

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const auto query_reader = cuda::row_reader<kHeadDim * 2>(0, lane);
    const int32_t* starts = args.block_starts;
    const int group = args.heads / args.key_heads;
    for (int i = threadIdx.x; i < kCells; i += kThreads) cells[i] = 0;

    for (;;) {
        __syncthreads();  // nothing of the last item is needed any more
        if (threadIdx.x == 0) walk.enter(args, take_item(args));
        __syncthreads();
        if (walk.item.key_tile < 0) return;
        {
            // Keys behind the tile, whose sums are 0, count as the last block's, so that equal ends
            // of a run of columns mean one block. A tile of more than kKeyRows rows is one block.
            const int row = walk.key_first + static_cast<int>(threadIdx.x);
            const int block = cuda::count_up_to(starts + walk.first_block, walk.num_keys, row) - 1;
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
            Sums sums = {};
            for (int key_head = 0; key_head < args.key_heads; ++key_head) {
                // In flight: the four units of keys and one of queries. The barrier also frees the
                // unit before them.
                cuda::wait_copies<1>();
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
                        cuda::wait_copies<1>();
                    } else {
                        cuda::wait_copies<kStages - 2>();
                    }
                    __syncthreads();
                    CUTLASS_PRAGMA_NO_UNROLL
                    for (int i = head == 0 ? kKeyUnits : 1; i > 0; --i) {
                        units.issue(args, walk, ring);
                    }
                    add_positive<T, kHeadDim, 0>(next_unit(), query_reader, keys, sums);
                    cuda::wait_copies<kStages - 2>();
                    __syncthreads();
                    units.issue(args, walk, ring);
                    add_positive<T, kHeadDim, 1>(next_unit(), query_reader, keys, sums);
                }
            }

            const Pair pair = walk.pairs[p % 2];
            const int num_keys = walk.num_keys;
            hide(pair, walk.key_end, warp, lane, sums);
            const int first_query = args.workspace.query_first[pair.query_tile];
            const int end_query = args.workspace.query_first[pair.query_tile + 1];
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
            args.workspace.parts[row + walk.first_block + threadIdx.x] = total;
        }
    }
}

/// scores = scale * (sum of the parts / number of query blocks).
__global__ void __launch_bounds__(kThreads)
mean_kernel(Workspace work, int num_blocks, float scale, float* __restrict__ scores) {
    const int n = blockIdx.x * kThreads + threadIdx.x;
    if (n >= num_blocks) return;
    const int2 block = work.blocks[n];
    float sum = 0;
    for (int part = 0; part < block.x; ++part) sum += work.parts[int64_t{part} * num_blocks + n];
    scores[n] = scale * (sum / static_cast<float>(block.y));
}

template <typename T, int kHeadDim>
void launch(const Arguments& args, cudaStream_t stream) {
    const size_t bytes = kStages * Producer<T, kHeadDim>::kUnitBytes;
    const auto kernel = block_scores_kernel<T, kHeadDim>;
    cuda::reserve_shared_memory("block_scores", kernel, bytes);
    int device = 0, processors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    kernel<<<std::max(processors, 1), kThreads, bytes, stream>>>(args);
    cuda::check_launch("block_scores");
}

}  // namespace

void block_scores_cuda(const BlockScoresParams& params, void* cuda_stream) {
    const Checker check("block_scores");
    check.that(params.q.dtype != DType::kFloat32, "q", "bfloat16 or float16 on CUDA",
               describe(params.q), ErrorKind::kUnsupported);
    const int64_t head_dim = params.q.size(2);
    check.that(head_dim >= 8 && head_dim <= 128 && head_dim % 8 == 0, "q",
               "a head size of a multiple of 8 up to 128 on CUDA", std::to_string(head_dim),
               ErrorKind::kUnsupported);
    for (const auto& [name, tensor] : {std::pair{"q", &params.q}, std::pair{"k", &params.k}}) {
        check.that(cuda::vectorisable(0, {tensor->data}), name, "data at a multiple of 16 bytes",
                   "another address", ErrorKind::kUnsupported);
    }
    const int64_t blocks = params.scores.size(0), sequences = params.cu_blocks.size(0) - 1;
    if (blocks == 0) return;
    const BlockScoresCut cut(params.q.size(0), blocks, sequences);
    const auto count = [](int64_t value) { return static_cast<int>(value); };
    const Arguments args{params.q.data,
                         params.k.data,
                         params.block_starts.as<const int32_t>(),
                         params.cu_blocks.as<const int32_t>(),
                         count(sequences),
                         count(blocks),
                         count(params.q.size(1)),
                         count(params.k.size(1)),
                         count(head_dim),
                         count(cut.tiles_per_part),
                         count(cut.parts),
                         Workspace(params.scratch.data, blocks)};
    const auto stream = static_cast<cudaStream_t>(cuda_stream);
    plan_kernel<<<1, kThreads, 0, stream>>>(args);
    cuda::check_launch("block_scores");
    const auto run = [&]<typename T>(T) {
        if (head_dim <= 64) {
            launch<T, 64>(args, stream);
        } else {
            launch<T, 128>(args, stream);
        }
    };
    if (params.q.dtype == DType::kBFloat16) {
        run(cutlass::bfloat16_t{});
    } else {
        run(cutlass::half_t{});
    }
    const auto scale = static_cast<float>(params.scale / static_cast<double>(args.heads));
    mean_kernel<<<static_cast<unsigned>(ceil_div<int64_t>(blocks, kThreads)), kThreads, 0,
                  stream>>>(args.workspace, args.num_blocks, scale, params.scores.as<float>());
    cuda::check_launch("block_scores");
}

}  // namespace lemo
