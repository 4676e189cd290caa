#include "segment_attention/plan.h"

#include <algorithm>

#include <cub/block/block_scan.cuh>

#include "common/launch.h"
#include "common/vector.h"

namespace lemo::cuda::segment_attention {
namespace {

constexpr int kThreads = 256;

/// Query row = position, keys likewise and of the same sequences: the plain causal order.
bool is_causal_by_row(const SegmentAttentionParams& p) {
    const bool equal_sets = p.q_positions.data == p.k_positions.data &&
                            p.cu_q.data == p.cu_k.data && p.q.size(0) == p.k.size(0);
    const bool rows_are_positions = !p.q_positions;
    return p.window == 0 && p.group_size == 0 && (equal_sets || rows_are_positions);
}

int num_shifts(const SegmentAttentionParams& p) { return p.group_size > 0 ? 2 : 1; }

/// Cumulative numbers of tiles; one thread block, since batches hold few sequences.
__global__ void
__launch_bounds__(kThreads)
count_tiles_kernel(const int32_t* __restrict__ cu_q, const int32_t* __restrict__ cu_k,
                   int num_sequences, int q_tile_rows, int k_tile_rows,
                   int32_t* __restrict__ cu_q_tiles, int32_t* __restrict__ cu_k_tiles) {
    using Scan = cub::BlockScan<int2, kThreads>;
    __shared__ typename Scan::TempStorage storage;
    const auto add = [](int2 a, int2 b) { return make_int2(a.x + b.x, a.y + b.y); };
    int2 total = make_int2(0, 0);
    for (int first = 0; first < num_sequences; first += kThreads) {
        const int s = first + static_cast<int>(threadIdx.x);
        int2 tiles = make_int2(0, 0);
        if (s < num_sequences) {
            tiles = make_int2(ceil_div(cu_q[s + 1] - cu_q[s], q_tile_rows),
                              ceil_div(cu_k[s + 1] - cu_k[s], k_tile_rows));
        }
        int2 sum, before;
        Scan(storage).ExclusiveScan(tiles, before, make_int2(0, 0), add, sum);
        if (s < num_sequences) {
            cu_q_tiles[s] = total.x + before.x;
            cu_k_tiles[s] = total.y + before.y;
        }
        total = add(total, sum);
        __syncthreads();  // the scan's storage is used again
    }
    if (threadIdx.x == 0) {
        cu_q_tiles[num_sequences] = total.x;
        cu_k_tiles[num_sequences] = total.y;
    }
}

/// The keys that each query sees, as rows of its sequence.
__global__ void __launch_bounds__(kThreads)
visible_keys_kernel(const int32_t* __restrict__ cu_q, const int32_t* __restrict__ cu_k,
                    const int32_t* __restrict__ q_positions,
                    const int32_t* __restrict__ k_positions, int num_sequences, int num_queries,
                    int64_t window, int64_t group_size, int2* __restrict__ visible) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= num_queries) return;
    const int sequence = part_of(cu_q, num_sequences, row);
    const int64_t position = q_positions ? q_positions[row] : row - cu_q[sequence];
    const int k_first = cu_k[sequence];
    const int num_k = cu_k[sequence + 1] - k_first;
    const int64_t shift = blockIdx.y == 0 ? 0 : group_size / 2;
    const Range seen = visible_positions(position, window, group_size, shift);
    const auto to_row = [&](int64_t limit) {
        if (k_positions != nullptr) {
            return partition_point(num_k, [&](int i) { return k_positions[k_first + i] < limit; });
        }
        return static_cast<int>(limit < num_k ? limit : num_k);
    };
    visible[int64_t{blockIdx.y} * num_queries + row] =
        make_int2(to_row(seen.first), to_row(seen.end));
}

}  // namespace

PlanScratch::PlanScratch(const SegmentAttentionParams& params, Arena& arena) {
    cu_q_tiles = arena.take<int32_t>(params.cu_q.size(0));
    cu_k_tiles = arena.take<int32_t>(params.cu_k.size(0));
    const int64_t ranges = is_causal_by_row(params) ? 0 : num_shifts(params) * params.q.size(0);
    visible = arena.take<int2>(ranges);
}

AttentionPlan make_plan(const SegmentAttentionParams& params, int q_tile_rows, int k_tile_rows,
                        const PlanScratch& scratch, cudaStream_t stream) {
    const int64_t num_sequences = params.cu_q.size(0) - 1;
    AttentionPlan plan{};
    plan.cu_q = params.cu_q.as<const int32_t>();
    plan.cu_k = params.cu_k.as<const int32_t>();
    plan.num_sequences = static_cast<int>(num_sequences);
    plan.num_queries = static_cast<int>(params.q.size(0));
    plan.num_shifts = num_shifts(params);
    plan.max_q_tiles =
        static_cast<int>(max_tiles(params.q.size(0), num_sequences, q_tile_rows));
    plan.max_k_tiles =
        static_cast<int>(max_tiles(params.k.size(0), num_sequences, k_tile_rows));

    if (num_sequences > 1) {
        count_tiles_kernel<<<1, kThreads, 0, stream>>>(plan.cu_q, plan.cu_k, plan.num_sequences,
                                                       q_tile_rows, k_tile_rows,
                                                       scratch.cu_q_tiles, scratch.cu_k_tiles);
        check_launch("segment_attention");
        plan.cu_q_tiles = scratch.cu_q_tiles;
        plan.cu_k_tiles = scratch.cu_k_tiles;
    }
    if (!is_causal_by_row(params) && plan.num_queries > 0) {
        const dim3 grid(grid_x("segment_attention", "q",
                               ceil_div<int64_t>(plan.num_queries, kThreads)),
                        static_cast<unsigned>(plan.num_shifts));
        visible_keys_kernel<<<grid, kThreads, 0, stream>>>(
            plan.cu_q, plan.cu_k,
            params.q_positions ? params.q_positions.as<const int32_t>() : nullptr,
            params.k_positions ? params.k_positions.as<const int32_t>() : nullptr,
            plan.num_sequences, plan.num_queries, params.window, params.group_size,
            scratch.visible);
        check_launch("segment_attention");
        plan.visible = scratch.visible;
    }
    return plan;
}

}  // namespace lemo::cuda::segment_attention
