// The kernel of block_attention: one pass over tiles of 128 queries x 64 keys of one head.
//
// A thread block takes a tile of queries and the blocks that begin within a chunk of tokens, so
// each result has one writer. A warp multiplies 32 queries with a tile of keys and leaves the
// scores in shared memory. Then each of its threads reduces those of one query, block by block:
// blocks of any size, and rows with any mask, are ranges of what it walks through.
#include "block_attention/portable/kernel.h"

#include <climits>
#include <cmath>

#include "common/async_copy.h"
#include "common/exp2.h"
#include "common/launch.h"
#include "common/reduce.h"
#include "common/search.h"
#include "common/shared_tile.h"
#include "common/warp_mma.h"
#include "lemo/blocks.h"

namespace lemo::cuda::block_attention::portable {
namespace {

constexpr int kThreads = 128;
constexpr int kQueryRows = kThreads;  // a thread owns the results of one of them
constexpr int kWarpRows = 32;
constexpr int kKeyRows = 64;
// Tokens in which the blocks of a thread block begin: enough to pay for its start, few enough that
// a few hundred queries occupy a GPU.
constexpr int kChunk = 512;
// Floats between the scores of one key and those of the next: lanes that store the accumulators of
// an mma meet in no bank, nor do lanes that read the scores of one key.
constexpr int kScoreStride = kQueryRows + 4;

/// Tiles in shared memory. Queries lie where the scores do, until they are in registers.
template <int kHeadDim>
struct Tiles {
    static constexpr int kRowBytes = kHeadDim * 2;
    static constexpr int kKeyBytes = kKeyRows * kRowBytes;
    static constexpr int kScoreBytes = kKeyRows * kScoreStride * static_cast<int>(sizeof(float));
    static constexpr int kBytes = 2 * kKeyBytes + kScoreBytes;
    static_assert(kQueryRows * kRowBytes <= kScoreBytes, "queries must fit");
};

/// Starts the copy of the rows [first, end) of one head, at most kTileRows of them; the rest of the
/// tile becomes zero.
template <typename T, int kHeadDim, int kTileRows>
__device__ __forceinline__ void copy_rows(const void* from, int64_t first, int64_t end, int heads,
                                          int head, int head_dim, unsigned char* tile) {
    constexpr int kPieces = kHeadDim / 8;  // of 16 bytes, of a row
    const T* base = static_cast<const T*>(from);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileRows * kPieces; i += kThreads) {
        const int row = (i + static_cast<int>(threadIdx.x)) / kPieces;
        const int piece = (i + static_cast<int>(threadIdx.x)) % kPieces;
        const bool valid = first + row < end && piece * 8 < head_dim;
        const int64_t offset = ((first + row) * heads + head) * head_dim + piece * 8;
        copy_async_if(valid, tile + swizzled<kHeadDim * 2>(row, piece),
                      valid ? base + offset : base);
    }
    commit_copies();
}

/// The keys [x, y) that a query sees; none where there is no such query, or where its row, which
/// nobody has checked, is none of the tokens.
__device__ __forceinline__ int2 visible_keys(const AttentionArguments& args, int64_t query) {
    const int2 none{INT_MAX, 0};
    if (query >= args.num_rows) return none;
    const int64_t row = args.wide_rows ? static_cast<const int64_t*>(args.rows)[query]
                                       : static_cast<const int32_t*>(args.rows)[query];
    if (row < 0 || row >= args.num_tokens) return none;
    const auto start = [&](int sequence) { return args.block_starts[args.cu_blocks[sequence]]; };
    const int sequence =
        partition_point(args.num_sequences, [&](int n) { return start(n) <= row; }) - 1;
    return {start(sequence), static_cast<int>(row) + 1};
}

/// A query's way through the blocks of its thread block.
struct BlockWalk {
    const int32_t* starts;
    int block, end_block;
    int2 visible;
    float scale;
    float* maximum;  // [B] of the query; null where there is no such query
    float* logsumexp;
    float top = -INFINITY, sum = 0;  // of `block` so far, not scaled, and of the exponentials

    /// Takes in the scores of the keys [first, end), kScoreStride apart, and stores the results of
    /// the blocks that end there, or before.
    __device__ __forceinline__ void take(const float* scores, int first, int end) {
        while (block < end_block && starts[block] < end) {
            const int block_end = starts[block + 1];
            add(scores, max(max(starts[block], first), visible.x) - first,
                min(min(block_end, end), visible.y) - first);
            if (block_end > end) return;
            if (maximum != nullptr) {
                maximum[block] = scale * top;
                logsumexp[block] = scale * top + logf(sum);
            }
            ++block;
            top = -INFINITY;
            sum = 0;
        }
    }

private:
    __device__ __forceinline__ void add(const float* scores, int first, int end) {
        if (first >= end) return;
        const float scale_log2 = scale * float(M_LOG2E);
        float highest = top, total = 0;
        for (int i = first; i < end; ++i) highest = fmaxf(highest, scores[i * kScoreStride]);
        for (int i = first; i < end; ++i) {
            total += exp2_approximate((scores[i * kScoreStride] - highest) * scale_log2);
        }
        sum = fmaf(sum, exp2_approximate((top - highest) * scale_log2), total);
        top = highest;
    }
};

/// The scores of a warp's queries for a tile of keys, to `scores` [kKeyRows, kScoreStride].
template <typename T, int kHeadDim>
__device__ __forceinline__ void multiply(const uint32_t (&queries)[kHeadDim / 16][2][4],
                                         const unsigned char* keys, int warp, int lane,
                                         float* scores) {
    const auto reader = column_reader<kHeadDim * 2>(0, lane);
    CUTLASS_PRAGMA_UNROLL
    for (int n = 0; n < kKeyRows; n += 16) {
        float sums[2][2][4] = {};  // of 16 queries and 8 keys each
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < kHeadDim / 16; ++step) {
            uint32_t both[4];
            load_matrices(both, keys + reader.offset(step, n));
            const uint32_t columns[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 4; ++i) {
                warp_mma<T>(sums[i / 2][i % 2], queries[step][i / 2], columns[i % 2]);
            }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
            CUTLASS_PRAGMA_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int key = n + i % 2 * 8 + lane % 4 * 2 + e % 2;
                const int row = warp * kWarpRows + i / 2 * 16 + lane / 4 + e / 2 * 8;
                scores[key * kScoreStride + row] = sums[i / 2][i % 2][e];
            }
        }
    }
}

int64_t __host__ __device__ query_tiles(const AttentionArguments& args) {
    return ceil_div<int64_t>(args.num_rows, kQueryRows);
}

/// Grid: tiles of queries, which read the same keys, of one chunk of tokens after another; heads.
template <typename T, int kHeadDim>
__global__ void
__launch_bounds__(kThreads, 3) portable_attention_kernel(AttentionArguments args) {
    using Shared = Tiles<kHeadDim>;
    extern __shared__ __align__(128) unsigned char keys[];
    __shared__ int scratch[kReduceScratch];
    unsigned char* query_tile = keys + 2 * Shared::kKeyBytes;
    auto* scores = reinterpret_cast<float*>(query_tile);

    const int32_t* starts = args.block_starts;
    const auto tiles = static_cast<unsigned>(query_tiles(args));
    const int chunk = static_cast<int>(blockIdx.x / tiles) * kChunk;
    const int first_block = count_up_to(starts, args.num_blocks, chunk - 1);
    const int end_block = count_up_to(starts, args.num_blocks, chunk + kChunk - 1);
    if (first_block == end_block) return;

    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int head = static_cast<int>(blockIdx.y);
    const int key_head = head / (args.heads / args.key_heads);
    const int64_t first_query = int64_t{blockIdx.x % tiles} * kQueryRows;
    const int64_t query = first_query + thread;
    const int2 visible = visible_keys(args, query);
    const int64_t result = (query * args.heads + head) * args.num_blocks;
    const bool exists = query < args.num_rows;
    BlockWalk walk{starts,
                   first_block,
                   end_block,
                   visible,
                   args.scale,
                   exists ? args.maximum + result : nullptr,
                   exists ? args.logsumexp + result : nullptr};

    // The keys that some query of the tile sees.
    const int lowest =
        block_reduce<kThreads>(visible.x, scratch, [](int a, int b) { return min(a, b); });
    const int highest =
        block_reduce<kThreads>(visible.y, scratch, [](int a, int b) { return max(a, b); });
    const int key_first = max(starts[first_block], lowest);
    const int key_end = min(starts[end_block], highest);
    if (key_first < key_end) {
        const auto copy_keys = [&](int first, unsigned char* to) {
            copy_rows<T, kHeadDim, kKeyRows>(args.k, first, key_end, args.key_heads, key_head,
                                             args.head_dim, to);
        };
        copy_rows<T, kHeadDim, kQueryRows>(args.q, first_query, args.num_rows, args.heads, head,
                                           args.head_dim, query_tile);
        copy_keys(key_first, keys);
        wait_copies<1>();
        __syncthreads();
        uint32_t queries[kHeadDim / 16][2][4];
        const auto reader = row_reader<Shared::kRowBytes>(warp * kWarpRows, lane);
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < kHeadDim / 16; ++step) {
            load_matrices(queries[step][0], query_tile + reader.offset(step, 0));
            load_matrices(queries[step][1], query_tile + reader.offset(step, 16));
        }
        int stage = 0;
        for (int first = key_first; first < key_end; first += kKeyRows, stage ^= 1) {
            wait_copies<0>();
            // The tile is there; the other one, and at first the queries, have been read.
            __syncthreads();
            if (first + kKeyRows < key_end) {
                copy_keys(first + kKeyRows, keys + (stage ^ 1) * Shared::kKeyBytes);
            }
            multiply<T, kHeadDim>(queries, keys + stage * Shared::kKeyBytes, warp, lane, scores);
            __syncwarp();
            walk.take(scores + thread, first, min(first + kKeyRows, key_end));
            __syncwarp();
        }
    }
    // Blocks that begin behind all keys that were seen, and one that ends there.
    walk.take(scores + thread, starts[end_block], starts[end_block]);
}

template <typename T, int kHeadDim>
void launch_kernel(const AttentionArguments& args, cudaStream_t stream) {
    constexpr size_t kBytes = Tiles<kHeadDim>::kBytes;
    const auto kernel = portable_attention_kernel<T, kHeadDim>;
    constexpr const char* kOp = "block_attention";
    reserve_shared_memory(kOp, kernel, kBytes);
    const int64_t chunks = ceil_div<int64_t>(args.num_tokens, kChunk);
    const dim3 grid(grid_x(kOp, "q", query_tiles(args) * chunks), grid_yz(kOp, "q", args.heads));
    kernel<<<grid, kThreads, kBytes, stream>>>(args);
    check_launch(kOp);
}

}  // namespace

void launch(const AttentionArguments& args, DType dtype, cudaStream_t stream) {
    dispatch_half(dtype, [&]<typename T>(T) {
        if (args.head_dim <= 64) {
            launch_kernel<T, 64>(args, stream);
        } else {
            launch_kernel<T, 128>(args, stream);
        }
    });
}

}  // namespace lemo::cuda::block_attention::portable
