// How block_scores cuts its work on CUDA: tiles of keys, tiles of queries, and the items of both
// that thread blocks take. Both tiers cut it alike.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "common/arena.h"
#include "common/block_tiles.h"
#include "common/search.h"
#include "lemo/block_scores.h"
#include "lemo/blocks.h"

namespace lemo::cuda::block_scores {

// Rows of one pair of tiles. A tile of queries is the whole blocks that fit, or one larger block.
inline constexpr int kQueryRows = 128;
inline constexpr int kKeyRows = 256;
// The queries of a tile of keys are summed in at most this many parts: enough to occupy a GPU on
// short inputs, few enough that the parts take memory linear in the number of blocks.
inline constexpr int64_t kMaxParts = 128;
// Tiles of keys that are worked on side by side: they read the same queries at the same time, and
// they and the queries of one wave of thread blocks stay in the L2 cache.
inline constexpr int kTileGroup = 16;

struct KeyTile {
    int32_t first_block, end_block;
    int32_t first_query_tile, end_query_tile;
};

/// The most parts that a tile of keys can have. The host knows sizes only, not where blocks lie.
inline int64_t max_parts(const BlockScoresParams& params) {
    const int64_t tokens = params.q.size(0), blocks = params.scores.size(0);
    const int64_t sequences = params.cu_blocks.size(0) - 1;
    // Two neighbouring tiles of a sequence have more than kQueryRows rows together.
    const int64_t tiles =
        std::min(blocks, 2 * tokens / (kQueryRows + 1) + std::max<int64_t>(sequences, 0));
    return std::max<int64_t>(std::min(tiles, kMaxParts), 1);
}

/// Scratch that the kernels share; every block of the op has a place in each array.
struct ScoresScratch {
    int32_t* num_key_tiles;
    int32_t* next_item;
    int32_t* tiles_per_part;  // query tiles
    KeyTile* key_tiles;
    int2* blocks;          // number of parts of the sum, number of terms of the mean
    int32_t* key_first;    // first block of each tile of keys
    int32_t* query_first;  // first block of each tile of queries
    int32_t* group_first;  // first item of each group of tiles of keys
    float* parts;          // [parts, B] sums of I[m, n] over the m of a part

    ScoresScratch(const BlockScoresParams& params, Arena& arena) {
        const int64_t num_blocks = params.scores.size(0);
        auto* counters = arena.take<int32_t>(3);
        num_key_tiles = counters;
        next_item = counters + 1;
        tiles_per_part = counters + 2;
        key_tiles = arena.take<KeyTile>(num_blocks);
        blocks = arena.take<int2>(num_blocks);
        key_first = arena.take<int32_t>(num_blocks + 1);
        query_first = arena.take<int32_t>(num_blocks + 1);
        group_first = arena.take<int32_t>(num_blocks + 1);
        parts = arena.take<float>(max_parts(params) * num_blocks);
    }
};

struct ScoresArguments {
    const void* q;
    const void* k;
    const int32_t* block_starts;
    const int32_t* cu_blocks;
    int num_sequences, num_blocks;
    int heads, key_heads, head_dim;
    int max_parts;
    ScoresScratch scratch;
};

/// Parts that the sums of a tile of keys are cut into. Cuts lie at multiples of tiles_per_part, so
/// that neighbouring tiles of keys read the same queries.
__device__ __forceinline__ int num_parts(const KeyTile& tile, int tiles_per_part) {
    return (tile.end_query_tile - 1) / tiles_per_part - tile.first_query_tile / tiles_per_part + 1;
}

/// One tile of keys and one part of its queries.
struct Item {
    int key_tile;  // -1: no more items
    int part;
};

/// For one thread of a thread block. Items of a group that lie side by side have the same queries.
__device__ inline Item take_item(const ScoresArguments& args) {
    const ScoresScratch& work = args.scratch;
    const int num_tiles = *work.num_key_tiles, step = *work.tiles_per_part;
    const int num_groups = ceil_div(num_tiles, kTileGroup);
    const int num_items = work.group_first[num_groups];
    for (;;) {
        const int i = atomicAdd(work.next_item, 1);
        if (i >= num_items) return {-1, 0};
        const int group = count_up_to(work.group_first, num_groups + 1, i) - 1;
        const int place = i - work.group_first[group];
        const int first = group * kTileGroup, key_tile = first + place % kTileGroup;
        if (key_tile >= num_tiles) continue;
        const KeyTile tile = work.key_tiles[key_tile];
        const int part = work.key_tiles[first].first_query_tile / step + place / kTileGroup -
                         tile.first_query_tile / step;
        if (part >= 0 && part < num_parts(tile, step)) return {key_tile, part};
    }
}

/// Up to kQueryRows queries and kKeyRows keys that are multiplied at a time.
struct alignas(16) Pair {
    int query_tile;  // -1 after the last pair of an item
    int query_row, query_end, key_row;
};

/// The order of the pairs of an item.
struct PairWalk {
    int first_block, num_keys;  // blocks of keys
    int key_first, key_end;     // their rows
    int end_query_tile;

    /// Returns the first pair.
    __device__ Pair enter(const ScoresArguments& args, const Item& item) {
        const KeyTile tile = args.scratch.key_tiles[item.key_tile];
        const int step = *args.scratch.tiles_per_part;
        const int part = tile.first_query_tile / step + item.part;
        first_block = tile.first_block;
        num_keys = tile.end_block - tile.first_block;
        key_first = args.block_starts[tile.first_block];
        key_end = args.block_starts[tile.end_block];
        end_query_tile = min((part + 1) * step, tile.end_query_tile);
        return tile_of(args, max(part * step, tile.first_query_tile));
    }

    /// Tiles of more rows than fit into a pair are single blocks.
    __device__ Pair after(const ScoresArguments& args, Pair pair) const {
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
    __device__ Pair tile_of(const ScoresArguments& args, int tile) const {
        if (tile >= end_query_tile) return {-1, 0, 0, 0};
        const int32_t* first = args.scratch.query_first + tile;
        return {tile, args.block_starts[first[0]], args.block_starts[first[1]], key_first};
    }
};

/// Cuts blocks into tiles, and clears the counter of items.
void launch_plan(const ScoresArguments& args, cudaStream_t stream);

/// scores = scale * (sum of the parts / number of query blocks).
void launch_mean(const ScoresArguments& args, float scale, float* scores, cudaStream_t stream);

}  // namespace lemo::cuda::block_scores
