// The backward pass of predictor: matrix products by cuBLAS in chunks of rows, small kernels
// between them. Gradients are summed in float32, chunk after chunk, so repeats give the same bits.
#include "common/float_reader.h"
#include "common/launch.h"
#include "common/search.h"
#include "predictor/portable/passes.h"
#include "predictor/portable/plan.h"

namespace lemo::cuda::predictor::portable {
namespace {

constexpr const char* kOp = "predictor_backward";
constexpr int kThreads = 256;

unsigned grid_of(int64_t count) {
    return static_cast<unsigned>(ceil_div<int64_t>(count, kThreads));
}

/// What backward needs beside the forward's plan.
struct BackwardPlan : PredictorPlan {
    float* up[2] = {};           // [E, R2] in fp32
    float* embedding[2] = {};    // [B, E]: k_n, and the mean of q_m over m >= n
    float* dembedding[2] = {};   // [B, E]
    float* dmeans = nullptr;     // [B, R2], of one net at a time
    void* dsecond = nullptr;     // [chunk, R2] in x's dtype, before the ReLU
    float* dfirst = nullptr;     // [chunk, R1]
    void* dfirst_low = nullptr;  // the same before the ReLU, in x's dtype
    int64_t second_stride = 0;   // elements of a row of `dsecond`

    BackwardPlan(const PredictorParams& params, Arena& arena)
        : PredictorPlan(params, arena, /*by_cublas=*/true) {
        int64_t units = 0;
        for (int n = 0; n < num_nets; ++n) {
            up[n] = arena.take<float>(nets[n].output * nets[n].second);
            embedding[n] = arena.take<float>(blocks * nets[n].output);
            dembedding[n] = arena.take<float>(blocks * nets[n].output);
            units = std::max(units, nets[n].second);
        }
        const int64_t rows = std::min(tokens, kChunkRows);
        second_stride = round_up(units, kPieceElements);
        dmeans = arena.take<float>(blocks * units);
        dsecond = arena.take<float>(rows * second_stride);
        dfirst = arena.take<float>(rows * first_stride);
        // fp32 needs no copy: the ReLU is applied in place.
        dfirst_low = x.dtype == DType::kFloat32 ? dfirst : arena.take<float>(rows * first_stride);
    }
};

__global__ void
__launch_bounds__(kThreads)
widen_kernel(FloatReader from, int64_t count, float* __restrict__ to) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i < count) to[i] = from.load<1>(i)[0];
}

/// dkeys[n] = dscore[n] * queries[n]; dqueries[m] = sum over n <= m of keys[n] * dscore[n], divided
/// by the number of blocks from n on. A thread walks the blocks of one sequence for one output.
__global__ void __launch_bounds__(kThreads)
dembedding_kernel(const float* __restrict__ dscores, const float* __restrict__ keys,
                  const float* __restrict__ queries, const int32_t* __restrict__ cu_blocks,
                  int64_t outputs, float* __restrict__ dkeys, float* __restrict__ dqueries) {
    const int64_t output = int64_t{blockIdx.y} * kThreads + threadIdx.x;
    if (output >= outputs) return;
    const int end = cu_blocks[blockIdx.x + 1];
    float sum = 0;
    for (int block = cu_blocks[blockIdx.x]; block < end; ++block) {
        const int64_t i = block * outputs + output;
        dkeys[i] = dscores[block] * queries[i];
        sum += keys[i] * (dscores[block] / static_cast<float>(end - block));
        dqueries[i] = sum;
    }
}

/// dsecond = share of the block's gradient where the activation is positive. Rows from `first_row`.
template <typename T>
__global__ void __launch_bounds__(kThreads)
dsecond_kernel(const float* __restrict__ second, const float* __restrict__ dmeans,
               const int32_t* __restrict__ block_starts, int num_blocks, int64_t first_row,
               int64_t units, int64_t stride, T* __restrict__ dsecond) {
    const int64_t row = blockIdx.x;
    const int block =
        count_up_to(block_starts, num_blocks, static_cast<int>(first_row + row)) - 1;
    const auto count = static_cast<float>(block_starts[block + 1] - block_starts[block]);
    for (int64_t unit = threadIdx.x; unit < units; unit += kThreads) {
        const bool positive = second[row * units + unit] > 0.0f;
        const float share = dmeans[block * units + unit] / count;
        dsecond[row * stride + unit] = T(positive ? share : 0.0f);
    }
}

/// to = from where the activation is positive; `to` may be `from`.
template <typename T>
__global__ void __launch_bounds__(kThreads)
relu_backward_kernel(const T* first, const float* from, int64_t rows, int64_t columns,
                     int64_t stride, T* to) {
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= rows * columns) return;
    const int64_t at = i / columns * stride + i % columns;
    to[at] = T(float(first[at]) > 0.0f ? from[at] : 0.0f);
}

/// A product of fp32 matrices without padding.
void multiply(const PredictorPlan& plan, cudaStream_t stream, int64_t m, int64_t n, int64_t k,
              GemmOperand a, GemmOperand b, float* c) {
    cuda::gemm(kOp, stream, m, n, k, 1.0f, a, b, 0.0f, c, DType::kFloat32, n, plan.gemm);
}

GemmOperand matrix(const float* data, int64_t stride) {
    return {data, DType::kFloat32, stride, false};
}

GemmOperand transposed(const float* data, int64_t stride) {
    return {data, DType::kFloat32, stride, true};
}

/// ddown and dmid of net `n` from `dmeans`.
void maps_backward(const BackwardPlan& plan, int n, const PredictorWeights& gradients,
                   cudaStream_t stream) {
    const Net& net = plan.nets[n];
    const DType dtype = plan.x.dtype;
    const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
    for (int64_t row = 0; row < plan.tokens; row += kChunkRows) {
        const int64_t rows = std::min(kChunkRows, plan.tokens - row);
        const float beta = row == 0 ? 0.0f : 1.0f;
        activate(kOp, plan, net, row, rows, stream);
        dispatch_float(dtype, [&]<typename T>(T) {
            dsecond_kernel<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
                plan.second, plan.dmeans, plan.block_starts.as<const int32_t>(),
                static_cast<int>(plan.blocks), row, net.second, plan.second_stride,
                static_cast<T*>(plan.dsecond));
        });
        check_launch(kOp);
        cuda::gemm(kOp, stream, net.second, net.first, rows, 1.0f,
                   {plan.dsecond, dtype, plan.second_stride, true},
                   {plan.first, dtype, net.stride, false}, beta, gradients.mid.data,
                   DType::kFloat32, net.first, plan.gemm);
        cuda::gemm(kOp, stream, rows, net.first, net.second, 1.0f,
                   {plan.dsecond, dtype, plan.second_stride, false},
                   {net.mid, dtype, net.stride, false}, 0.0f, plan.dfirst, DType::kFloat32,
                   net.stride, plan.gemm);
        const unsigned grid = grid_of(rows * net.first);
        if (grid == 0) continue;
        dispatch_float(dtype, [&]<typename T>(T) {
            relu_backward_kernel<T><<<grid, kThreads, 0, stream>>>(
                static_cast<const T*>(plan.first), plan.dfirst, rows, net.first, net.stride,
                static_cast<T*>(plan.dfirst_low));
        });
        check_launch(kOp);
        const auto* x = static_cast<const std::byte*>(plan.x.data) + row * plan.hidden * element;
        cuda::gemm(kOp, stream, net.first, plan.hidden, rows, 1.0f,
                   {plan.dfirst_low, dtype, net.stride, true}, {x, dtype, plan.hidden, false}, beta,
                   gradients.down.data, DType::kFloat32, plan.hidden, plan.gemm);
    }
}

}  // namespace

int64_t scratch_bytes(const PredictorBackwardParams& params) {
    return count_scratch_bytes<BackwardPlan>(params.forward);
}

void launch(const PredictorBackwardParams& params, cudaStream_t stream) {
    Arena arena(params.scratch);
    const BackwardPlan plan(params.forward, arena);
    const PredictorWeights* gradients[] = {&params.dkey, &params.dquery};
    if (plan.blocks == 0) {
        for (int n = 0; n < plan.num_nets; ++n) {
            for (const Tensor* g : {&gradients[n]->down, &gradients[n]->mid, &gradients[n]->up}) {
                const size_t bytes = static_cast<size_t>(g->num_elements()) * sizeof(float);
                check_status(kOp, cudaMemsetAsync(g->data, 0, bytes, stream));
            }
        }
        return;
    }
    mean_activations(kOp, plan, stream);

    const int64_t blocks = plan.blocks, outputs = plan.nets[0].output;
    const float* dembedding[2] = {plan.dembedding[0], plan.dembedding[1]};
    for (int n = 0; n < plan.num_nets; ++n) {
        const Net& net = plan.nets[n];
        if (const unsigned grid = grid_of(outputs * net.second); grid > 0) {
            widen_kernel<<<grid, kThreads, 0, stream>>>(FloatReader(net.up),
                                                        outputs * net.second, plan.up[n]);
            check_launch(kOp);
        }
        // Without queries nobody asks for the embedding.
        if (plan.num_nets == 1) continue;
        multiply(plan, stream, blocks, outputs, net.second,
                 matrix(n == 0 ? net.means : net.visible, net.second),
                 transposed(plan.up[n], net.second), plan.embedding[n]);
    }
    if (plan.num_nets == 1) {
        dembedding[0] = params.dscores.as<const float>();
    } else if (outputs > 0) {
        const dim3 grid(grid_x(kOp, "cu_blocks", plan.sequences),
                        grid_yz(kOp, "k_up", ceil_div<int64_t>(outputs, kThreads)));
        dembedding_kernel<<<grid, kThreads, 0, stream>>>(
            params.dscores.as<const float>(), plan.embedding[0], plan.embedding[1],
            plan.cu_blocks.as<const int32_t>(), outputs, plan.dembedding[0], plan.dembedding[1]);
        check_launch(kOp);
    }
    for (int n = 0; n < plan.num_nets; ++n) {
        const Net& net = plan.nets[n];
        multiply(plan, stream, outputs, net.second, blocks, transposed(dembedding[n], outputs),
                 matrix(net.means, net.second), gradients[n]->up.as<float>());
        multiply(plan, stream, blocks, net.second, outputs, matrix(dembedding[n], outputs),
                 matrix(plan.up[n], net.second), plan.dmeans);
        maps_backward(plan, n, *gradients[n], stream);
    }
}

}  // namespace lemo::cuda::predictor::portable
