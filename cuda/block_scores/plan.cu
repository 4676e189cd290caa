#include "block_scores/plan.h"

#include "common/launch.h"

namespace lemo::cuda::block_scores {
namespace {

constexpr int kPlanThreads = 256;
// Block starts that the cut reads from shared memory: one thread follows them one by one.
constexpr int kStagedStarts = 8192;
// Threads of the mean, each with a share of the parts of 32 blocks.
constexpr int kMeanBlocks = 32, kMeanShares = 16;

/// Items of a group of tiles of keys: those of its first tile's first part up to its last tile's
/// last. Where a tile does not have the part, the item is passed over.
__device__ int num_items(const ScoresScratch& work, int group, int num_tiles, int step) {
    const KeyTile first = work.key_tiles[group * kTileGroup];
    const KeyTile last = work.key_tiles[min((group + 1) * kTileGroup, num_tiles) - 1];
    const int parts = (last.end_query_tile - 1) / step - first.first_query_tile / step + 1;
    return parts * kTileGroup;
}

/// One thread block.
__global__ void
__launch_bounds__(kPlanThreads) scores_plan_kernel(ScoresArguments args) {
    __shared__ int32_t staged[kStagedStarts];
    __shared__ int num_key_tiles, num_query_tiles;
    const ScoresScratch& work = args.scratch;
    const int thread = static_cast<int>(threadIdx.x);
    const int32_t* starts = args.block_starts;
    if (args.num_blocks < kStagedStarts) {
        for (int i = thread; i <= args.num_blocks; i += kPlanThreads) staged[i] = starts[i];
        starts = staged;
        __syncthreads();
    }
    // Two warps, so that one does not wait for the other.
    if (thread == 0) {
        num_key_tiles = cut_tiles(starts, args.cu_blocks, args.num_sequences, kKeyRows,
                                        work.key_first);
        *work.num_key_tiles = num_key_tiles;
        *work.next_item = 0;
    } else if (thread == 32) {
        num_query_tiles = cut_tiles(starts, args.cu_blocks, args.num_sequences, kQueryRows,
                                          work.query_first);
    }
    __syncthreads();
    const int step = max(ceil_div(num_query_tiles, args.max_parts), 1);
    if (thread == 0) *work.tiles_per_part = step;
    for (int t = thread; t < num_key_tiles; t += kPlanThreads) {
        KeyTile tile{work.key_first[t], work.key_first[t + 1], 0, 0};
        const int sequence =
            count_up_to(args.cu_blocks, args.num_sequences + 1, tile.first_block) - 1;
        const int end = args.cu_blocks[sequence + 1];
        const auto tile_of = [&](int block) {
            return count_up_to(work.query_first, num_query_tiles, block) - 1;
        };
        tile.first_query_tile = tile_of(tile.first_block);
        tile.end_query_tile = tile_of(end - 1) + 1;
        work.key_tiles[t] = tile;
        const int parts = num_parts(tile, step);
        for (int n = tile.first_block; n < tile.end_block; ++n) {
            work.blocks[n] = int2{parts, end - n};
        }
    }
    __syncthreads();
    // One warp sums the groups up.
    if (thread >= 32) return;
    const int num_groups = ceil_div(num_key_tiles, kTileGroup);
    int before = 0;
    if (thread == 0) work.group_first[0] = 0;
    for (int base = 0; base < num_groups; base += 32) {
        const int group = base + thread;
        int sum = group < num_groups ? num_items(work, group, num_key_tiles, step) : 0;
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, sum, offset);
            if (thread >= offset) sum += other;
        }
        sum += before;
        if (group < num_groups) work.group_first[group + 1] = sum;
        before = __shfl_sync(0xffffffffu, sum, 31);
    }
}

__global__ void __launch_bounds__(kMeanBlocks * kMeanShares)
scores_mean_kernel(ScoresScratch work, int num_blocks, float scale, float* __restrict__ scores) {
    __shared__ float sums[kMeanShares][kMeanBlocks];
    const int lane = static_cast<int>(threadIdx.x), share = static_cast<int>(threadIdx.y);
    const int n = static_cast<int>(blockIdx.x) * kMeanBlocks + lane;
    const int2 block = n < num_blocks ? work.blocks[n] : int2{0, 1};
    float sum = 0;
    for (int part = share; part < block.x; part += kMeanShares) {
        sum += work.parts[int64_t{part} * num_blocks + n];
    }
    sums[share][lane] = sum;
    __syncthreads();
    if (share > 0 || n >= num_blocks) return;
    for (int i = 1; i < kMeanShares; ++i) sum += sums[i][lane];
    scores[n] = scale * (sum / static_cast<float>(block.y));
}

}  // namespace

void launch_plan(const ScoresArguments& args, cudaStream_t stream) {
    scores_plan_kernel<<<1, kPlanThreads, 0, stream>>>(args);
    check_launch("block_scores");
}

void launch_mean(const ScoresArguments& args, float scale, float* scores, cudaStream_t stream) {
    const auto grid = static_cast<unsigned>(ceil_div(args.num_blocks, kMeanBlocks));
    scores_mean_kernel<<<grid, dim3(kMeanBlocks, kMeanShares), 0, stream>>>(
        args.scratch, args.num_blocks, scale, scores);
    check_launch("block_scores");
}

}  // namespace lemo::cuda::block_scores
