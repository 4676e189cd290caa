// The low-rank maps of a tile of 128 rows in one kernel: x passes through shared memory once for
// each predictor, and what leaves are the sums of the second activations over the rows of blocks.
// (The last map is linear, so it comes after the mean.)
#include "common/async_copy.h"
#include "common/launch.h"
#include "common/search.h"
#include "common/shared_tile.h"
#include "common/vector.h"
#include "common/warp_mma.h"
#include "predictor/portable/plan.h"

namespace lemo::cuda::predictor::portable {
namespace {

constexpr int kWarpRows = 64;
constexpr int kWarpsAcross = 4;
constexpr int kThreads = kTileRows / kWarpRows * kWarpsAcross * 32;
// Elements of a row that a stage holds, and stages in flight: 96 KiB at 256 units, which a block
// has on every GPU of this tier.
constexpr int kDepth = 32;
constexpr int kStages = 4;
constexpr int kRowBytes = kDepth * 2;

struct FusedNet {
    const void* down;
    const void* mid;
    int first, second, stride;
    float* sums;
};

struct FusedArguments {
    const void* x;
    const int32_t* block_starts;
    int64_t tokens;
    int hidden, num_blocks, num_nets;
    FusedNet nets[2];
};

/// Shared memory for kWidth units: a ring of stages of x and `down`; later the first activations,
/// and behind them two stages of `mid`, in whose place the sums of blocks are gathered at last.
template <int kWidth>
struct FusedShared {
    static constexpr int kRows = kTileRows * kRowBytes;
    static constexpr int kWeights = kWidth * kRowBytes;
    static constexpr int kStage = kRows + kWeights;
    static constexpr int kMid = kTileRows * kWidth * 2;
    static constexpr int kBytes = kStages * kStage;
    static_assert(kMid + 2 * kWeights <= kBytes, "the second map fits where the ring was");
    static_assert(2 * 2 * kWidth * static_cast<int>(sizeof(float)) <= 2 * kWeights,
                  "two buffers of sums, for both rows of warps, fit where `mid` was");
};

/// Copies kNumRows rows of kDepth elements from column `column` on; zeros behind both ends.
template <typename T, int kNumRows>
__device__ __forceinline__ void copy_rows(unsigned char* to, const T* from, int64_t stride,
                                          int64_t num_rows, int column, int num_columns) {
    constexpr int kPieces = kRowBytes / 16, kPassRows = kThreads / kPieces;
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const bool in_row = column + piece * 8 < num_columns;
    CUTLASS_PRAGMA_UNROLL
    for (int pass = 0; pass < kNumRows / kPassRows; ++pass) {
        const int r = row + pass * kPassRows;
        const bool valid = in_row && r < num_rows;
        copy_async_if(valid, to + swizzled<kRowBytes>(r, piece),
                      valid ? from + r * stride + column + piece * 8 : from);
    }
}

/// A warp's accumulators: 64 rows x a quarter of the units.
template <int kWidth>
using Accumulators = float[kWarpRows / 16][kWidth / kWarpsAcross / 8][4];

/// accumulators += rows of A times rows of B, over one stage. The readers stand at the warp's first
/// rows; `step` is the first step of A.
template <typename T, int kWidth, int kRowBytesA>
__device__ __forceinline__ void stage_mma(const unsigned char* a,
                                          const FragmentReader<kRowBytesA>& a_reader, int step,
                                          const unsigned char* b,
                                          const FragmentReader<kRowBytes>& b_reader,
                                          Accumulators<kWidth>& accumulators) {
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kDepth / 16; ++k) {
        uint32_t rows[kWarpRows / 16][4];
        CUTLASS_PRAGMA_UNROLL
        for (int m = 0; m < kWarpRows / 16; ++m) {
            load_matrices(rows[m], a + a_reader.offset(step + k, m * 16));
        }
        CUTLASS_PRAGMA_UNROLL
        for (int n = 0; n < kWidth / kWarpsAcross / 8; n += 2) {
            uint32_t columns[4];
            load_matrices(columns, b + b_reader.offset(k, n * 8));
            const uint32_t low[2] = {columns[0], columns[1]}, high[2] = {columns[2], columns[3]};
            CUTLASS_PRAGMA_UNROLL
            for (int m = 0; m < kWarpRows / 16; ++m) {
                warp_mma<T>(accumulators[m][n], rows[m], low);
                warp_mma<T>(accumulators[m][n + 1], rows[m], high);
            }
        }
    }
}

/// Rounds the activations of the warp into the tile `to` of rows of kWidth elements.
template <typename T, int kWidth>
__device__ __forceinline__ void store_positive(const Accumulators<kWidth>& accumulators,
                                               int first_row, int first_unit, int lane,
                                               unsigned char* to) {
    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < kWarpRows / 16; ++m) {
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + m * 16 + half * 8 + lane / 4;
            CUTLASS_PRAGMA_UNROLL
            for (int n = 0; n < kWidth / kWarpsAcross / 8; ++n) {
                cutlass::AlignedArray<T, 2> pair;
                pair[0] = T(fmaxf(accumulators[m][n][half * 2], 0.0f));
                pair[1] = T(fmaxf(accumulators[m][n][half * 2 + 1], 0.0f));
                unsigned char* at = to + swizzled<kWidth * 2>(row, first_unit / 8 + n);
                store_vector<2>(reinterpret_cast<T*>(at) + lane % 4 * 2, pair);
            }
        }
    }
}

/// Sums max(second, 0) over rows [first, end) of the tile, for the warp's rows and units, into
/// `gathered` [kWidth].
template <int kWidth>
__device__ __forceinline__ void sum_rows(const Accumulators<kWidth>& second, int first, int end,
                                         int first_row, int first_unit, int lane, float* gathered) {
    CUTLASS_PRAGMA_UNROLL
    for (int n = 0; n < kWidth / kWarpsAcross / 8; ++n) {
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < 2; ++e) {
            float sum = 0;
            CUTLASS_PRAGMA_UNROLL
            for (int m = 0; m < kWarpRows / 16; ++m) {
                CUTLASS_PRAGMA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int row = first_row + m * 16 + half * 8 + lane / 4;
                    const bool inside = row >= first && row < end;
                    sum += inside ? fmaxf(second[m][n][half * 2 + e], 0.0f) : 0.0f;
                }
            }
            CUTLASS_PRAGMA_UNROLL
            for (int offset = 4; offset < 32; offset *= 2) {
                sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            }
            if (lane < 4) gathered[first_unit + n * 8 + lane * 2 + e] = sum;
        }
    }
}

template <typename T, int kWidth>
__global__ void
__launch_bounds__(kThreads, 1)
fused_kernel(const __grid_constant__ FusedArguments args) {
    using Bytes = FusedShared<kWidth>;
    extern __shared__ __align__(1024) unsigned char shared[];
    const FusedNet& net = args.nets[blockIdx.x % args.num_nets];
    const int tile = blockIdx.x / args.num_nets;
    const int64_t first_token = int64_t{tile} * kTileRows;
    const int num_rows = static_cast<int>(min(int64_t{kTileRows}, args.tokens - first_token));
    const T* x = static_cast<const T*>(args.x) + first_token * args.hidden;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = warp / kWarpsAcross * kWarpRows;
    const int first_unit = warp % kWarpsAcross * (kWidth / kWarpsAcross);
    const auto weight_reader = column_reader<kRowBytes>(first_unit, lane);

    Accumulators<kWidth> accumulators = {};
    {
        const auto x_reader = row_reader<kRowBytes>(first_row, lane);
        const int steps = ceil_div(args.hidden, kDepth);
        const auto copy = [&](int step) {
            if (step < steps) {
                unsigned char* to = shared + step % kStages * Bytes::kStage;
                copy_rows<T, kTileRows>(to, x, args.hidden, num_rows, step * kDepth, args.hidden);
                copy_rows<T, kWidth>(to + Bytes::kRows, static_cast<const T*>(net.down),
                                     args.hidden, net.first, step * kDepth, args.hidden);
            }
            commit_copies();
        };
        for (int step = 0; step < kStages - 1; ++step) copy(step);
        for (int step = 0; step < steps; ++step) {
            wait_copies<kStages - 2>();
            __syncthreads();
            copy(step + kStages - 1);
            const unsigned char* stage = shared + step % kStages * Bytes::kStage;
            stage_mma<T, kWidth>(stage, x_reader, 0, stage + Bytes::kRows, weight_reader,
                                 accumulators);
        }
    }
    wait_copies<0>();
    __syncthreads();  // the ring is free
    store_positive<T, kWidth>(accumulators, first_row, first_unit, lane, shared);
    CUTLASS_PRAGMA_UNROLL
    for (auto& row : accumulators) {
        CUTLASS_PRAGMA_UNROLL
        for (auto& result : row) {
            CUTLASS_PRAGMA_UNROLL
            for (float& element : result) element = 0.0f;
        }
    }
    {
        const auto reader = row_reader<kWidth * 2>(first_row, lane);
        const int steps = ceil_div(net.stride, kDepth);
        const auto copy = [&](int step) {
            if (step < steps) {
                copy_rows<T, kWidth>(shared + Bytes::kMid + step % 2 * Bytes::kWeights,
                                     static_cast<const T*>(net.mid), net.stride, net.second,
                                     step * kDepth, net.stride);
            }
            commit_copies();
        };
        copy(0);
        copy(1);
        for (int step = 0; step < steps; ++step) {
            wait_copies<1>();
            __syncthreads();  // also: the first activations are all there
            const unsigned char* mid = shared + Bytes::kMid + step % 2 * Bytes::kWeights;
            stage_mma<T, kWidth>(shared, reader, step * (kDepth / 16), mid, weight_reader,
                                 accumulators);
            __syncthreads();
            copy(step + 2);
        }
    }

    // Blocks that the tile meets. Two buffers: a thread that still adds up one block's sums is not
    // overtaken by more than the next block's.
    float* gathered = reinterpret_cast<float*>(shared + Bytes::kMid);
    const auto first = static_cast<int>(first_token);
    int block = count_up_to(args.block_starts, args.num_blocks, first) - 1;
    for (; block < args.num_blocks; ++block) {
        const int64_t start = args.block_starts[block] - first_token;
        if (start >= num_rows) break;
        const int64_t end = args.block_starts[block + 1] - first_token;
        float* buffer = gathered + block % 2 * (2 * kWidth);
        sum_rows<kWidth>(accumulators, static_cast<int>(max(start, int64_t{0})),
                         static_cast<int>(min(end, int64_t{num_rows})), first_row, first_unit, lane,
                         buffer + warp / kWarpsAcross * kWidth);
        __syncthreads();
        for (int unit = threadIdx.x; unit < net.second; unit += kThreads) {
            net.sums[(int64_t{block} + tile) * net.second + unit] =
                buffer[unit] + buffer[kWidth + unit];
        }
    }
}

template <typename T, int kWidth>
void launch_kernel(const char* op, const FusedArguments& args, int64_t tiles, cudaStream_t stream) {
    const auto kernel = fused_kernel<T, kWidth>;
    constexpr size_t kBytes = FusedShared<kWidth>::kBytes;
    reserve_shared_memory(op, kernel, kBytes);
    const unsigned grid = grid_x(op, "x", tiles * args.num_nets);
    kernel<<<grid, kThreads, kBytes, stream>>>(args);
    check_launch(op);
}

}  // namespace

void fused_sums(const char* op, const PredictorPlan& plan, cudaStream_t stream) {
    if (plan.tiles == 0) return;
    FusedArguments args{plan.x.data,
                   plan.block_starts.as<const int32_t>(),
                   plan.tokens,
                   static_cast<int>(plan.hidden),
                   static_cast<int>(plan.blocks),
                   plan.num_nets,
                   {}};
    int64_t width = 0;
    for (int n = 0; n < plan.num_nets; ++n) {
        const Net& net = plan.nets[n];
        args.nets[n] = {net.down,
                        net.mid,
                        static_cast<int>(net.first),
                        static_cast<int>(net.second),
                        static_cast<int>(net.stride),
                        net.sums};
        width = std::max({width, net.stride, net.second});
    }
    dispatch_half(plan.x.dtype, [&]<typename T>(T) {
        if (width <= kFusedWidth / 2) {
            launch_kernel<T, kFusedWidth / 2>(op, args, plan.tiles, stream);
        } else {
            launch_kernel<T, kFusedWidth>(op, args, plan.tiles, stream);
        }
    });
}

}  // namespace lemo::cuda::predictor::portable
