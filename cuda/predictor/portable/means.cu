// The parts of predictor that both directions share: weights in x's dtype, activations by cuBLAS
// where the fused kernel does not fit, and their means over blocks.
#include "common/float_reader.h"
#include "common/launch.h"
#include "common/search.h"
#include "predictor/portable/plan.h"

namespace lemo::cuda::predictor::portable {
namespace {

constexpr int kThreads = 256;
// visible_kernel: units of a thread block, and runs of blocks that it sums side by side.
constexpr int kUnits = 32;
constexpr int kRuns = 32;

struct RepackArguments {
    FloatReader from;
    void* to;
    int64_t rows, columns, stride;
};

template <typename T>
__global__ void
__launch_bounds__(kThreads) repack_kernel(RepackArguments args) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= args.rows * args.stride) return;
    const int64_t row = i / args.stride, column = i % args.stride;
    float value = 0;
    if (column < args.columns) value = args.from.load<1>(row * args.columns + column)[0];
    static_cast<T*>(args.to)[i] = T(value);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
relu_kernel(T* values, int64_t rows, int64_t columns, int64_t stride) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= rows * columns) return;
    T& value = values[i / columns * stride + i % columns];
    value = T(fmaxf(float(value), 0.0f));
}

/// Sums of max(second, 0) over the rows that a block and a tile of rows share. `second` holds the
/// rows from `first_row` on.
__global__ void __launch_bounds__(kThreads)
sum_rows_kernel(const float* __restrict__ second, const int32_t* __restrict__ block_starts,
                int num_blocks, int64_t first_row, int64_t end_row, int64_t units,
                float* __restrict__ sums) {
    const int64_t unit = int64_t{blockIdx.y} * kThreads + threadIdx.x;
    if (unit >= units) return;
    const int64_t tile = first_row / kTileRows + blockIdx.x;
    const int64_t end = min((tile + 1) * kTileRows, end_row);
    int64_t row = tile * kTileRows;
    int block = count_up_to(block_starts, num_blocks, static_cast<int>(row)) - 1;
    for (; row < end; ++block) {
        const int64_t block_end = min(int64_t{block_starts[block + 1]}, end);
        float sum = 0;
        for (; row < block_end; ++row) {
            sum += fmaxf(second[(row - first_row) * units + unit], 0.0f);
        }
        sums[(block + tile) * units + unit] = sum;
    }
}

/// Mean over a block's rows: the sums of the tiles that it meets, in their order.
__global__ void __launch_bounds__(kThreads)
means_kernel(const float* __restrict__ sums, const int32_t* __restrict__ block_starts,
             int64_t units, float* __restrict__ means) {
    const int64_t block = blockIdx.x;
    const int first = block_starts[block], end = block_starts[block + 1];
    for (int64_t unit = threadIdx.x; unit < units; unit += kThreads) {
        float sum = 0;
        for (int64_t tile = first / kTileRows; tile <= (end - 1) / kTileRows; ++tile) {
            sum += sums[(block + tile) * units + unit];
        }
        means[block * units + unit] = sum / static_cast<float>(end - first);
    }
}

/// visible[n] = mean of means[m] over the blocks m >= n of a sequence. A thread block takes some
/// units of one sequence, cut into runs of blocks: first the sums of runs, then every block's.
__global__ void __launch_bounds__(kUnits * kRuns)
visible_kernel(const float* __restrict__ means, const int32_t* __restrict__ cu_blocks,
               int64_t units, float* __restrict__ visible) {
    __shared__ float run_sums[kRuns][kUnits];
    const int lane = threadIdx.x % kUnits, run = threadIdx.x / kUnits;
    const int64_t unit = int64_t{blockIdx.y} * kUnits + lane;
    const int first = cu_blocks[blockIdx.x], end = cu_blocks[blockIdx.x + 1];
    const int length = ceil_div(end - first, kRuns);
    const int run_first = min(first + run * length, end), run_end = min(run_first + length, end);
    const bool valid = unit < units;

    float sum = 0;
    for (int block = run_end - 1; valid && block >= run_first; --block) {
        sum += means[block * units + unit];
    }
    run_sums[run][lane] = sum;
    __syncthreads();
    sum = 0;
    for (int later = kRuns - 1; later > run; --later) sum += run_sums[later][lane];
    for (int block = run_end - 1; valid && block >= run_first; --block) {
        sum += means[block * units + unit];
        visible[block * units + unit] = sum / static_cast<float>(end - block);
    }
}

unsigned grid_of(int64_t count) {
    return static_cast<unsigned>(ceil_div<int64_t>(count, kThreads));
}

void sums_by_cublas(const char* op, const PredictorPlan& plan, const Net& net,
                    cudaStream_t stream) {
    const char* argument = &net == plan.nets ? "k_mid" : "q_mid";
    for (int64_t row = 0; row < plan.tokens; row += kChunkRows) {
        const int64_t rows = std::min(kChunkRows, plan.tokens - row);
        activate(op, plan, net, row, rows, stream);
        if (net.second == 0) continue;
        const dim3 grid(grid_x(op, "x", ceil_div<int64_t>(rows, kTileRows)),
                        grid_yz(op, argument, ceil_div<int64_t>(net.second, kThreads)));
        sum_rows_kernel<<<grid, kThreads, 0, stream>>>(
            plan.second, plan.block_starts.as<const int32_t>(), static_cast<int>(plan.blocks), row,
            row + rows, net.second, net.sums);
        check_launch(op);
    }
}

}  // namespace

void repack(const char* op, const PredictorPlan& plan, cudaStream_t stream) {
    for (int i = 0; i < plan.num_repacks; ++i) {
        const Repack& matrix = plan.repacks[i];
        const RepackArguments args{FloatReader(matrix.from), matrix.to, matrix.from.size(0),
                                   matrix.from.size(1), matrix.stride};
        const unsigned grid = grid_of(args.rows * args.stride);
        if (grid == 0) continue;
        dispatch_float(plan.x.dtype, [&]<typename T>(T) {
            repack_kernel<T><<<grid, kThreads, 0, stream>>>(args);
        });
        check_launch(op);
    }
}

void activate(const char* op, const PredictorPlan& plan, const Net& net, int64_t row, int64_t rows,
              cudaStream_t stream) {
    const DType dtype = plan.x.dtype;
    const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
    const auto* x = static_cast<const std::byte*>(plan.x.data) + row * plan.hidden * element;
    cuda::gemm(op, stream, rows, net.first, plan.hidden, 1.0f, {x, dtype, plan.hidden, false},
               {net.down, dtype, plan.hidden, true}, 0.0f, plan.first, dtype, net.stride,
               plan.gemm);
    const unsigned grid = grid_of(rows * net.first);
    if (grid == 0) return;
    dispatch_float(dtype, [&]<typename T>(T) {
        relu_kernel<T><<<grid, kThreads, 0, stream>>>(static_cast<T*>(plan.first), rows, net.first,
                                                      net.stride);
    });
    check_launch(op);
    cuda::gemm(op, stream, rows, net.second, net.first, 1.0f,
               {plan.first, dtype, net.stride, false}, {net.mid, dtype, net.stride, true}, 0.0f,
               plan.second, DType::kFloat32, net.second, plan.gemm);
}

void mean_activations(const char* op, const PredictorPlan& plan, cudaStream_t stream) {
    repack(op, plan, stream);
    if (plan.fused) {
        fused_sums(op, plan, stream);
    } else {
        for (int n = 0; n < plan.num_nets; ++n) sums_by_cublas(op, plan, plan.nets[n], stream);
    }
    if (plan.blocks == 0) return;
    for (int n = 0; n < plan.num_nets; ++n) {
        const Net& net = plan.nets[n];
        means_kernel<<<grid_x(op, "block_starts", plan.blocks), kThreads, 0, stream>>>(
            net.sums, plan.block_starts.as<const int32_t>(), net.second, net.means);
        check_launch(op);
        if (net.visible == nullptr) continue;
        const dim3 grid(grid_x(op, "cu_blocks", plan.sequences),
                        grid_yz(op, "q_mid", ceil_div<int64_t>(net.second, kUnits)));
        visible_kernel<<<grid, kUnits * kRuns, 0, stream>>>(
            net.means, plan.cu_blocks.as<const int32_t>(), net.second, net.visible);
        check_launch(op);
    }
}

}  // namespace lemo::cuda::predictor::portable
