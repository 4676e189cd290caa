// The forward pass of predictor: means of the second activations over blocks, by the fused kernel
// or by cuBLAS, then the last map and the scores.
#include "common/float_reader.h"
#include "common/launch.h"
#include "predictor/portable/passes.h"
#include "predictor/portable/plan.h"

namespace lemo::cuda::predictor::portable {
namespace {

// Blocks whose scores a thread block computes at a time: the rows of `up` are read once for all.
constexpr int kBlocks = 8;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

struct ScoreArguments {
    const float* keys;     // [B, R2] means
    const float* queries;  // [B, R2 of the queries], null without a query predictor
    FloatReader key_up, query_up;
    int64_t key_units, query_units, outputs, num_blocks;
    float* scores;
};

struct ForwardPlan : PredictorPlan {
    ForwardPlan(const PredictorParams& params, Arena& arena)
        : PredictorPlan(params, arena, /*by_cublas=*/false) {}
};

/// Dots of one row of `up` with `count` rows of `means`, the same in every lane.
__device__ __forceinline__ void dot_rows(const FloatReader& up, int64_t row, const float* means,
                                         int count, int64_t units, int lane,
                                         float (&dots)[kBlocks]) {
    for (float& dot : dots) dot = 0;
    for (int64_t unit = lane; unit < units; unit += 32) {
        const float weight = up.load<1>(row * units + unit)[0];
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            if (b < count) dots[b] += weight * means[b * units + unit];
        }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
        CUTLASS_PRAGMA_UNROLL
        for (int offset = 16; offset > 0; offset /= 2) {
            dots[b] += __shfl_xor_sync(0xffffffffu, dots[b], offset);
        }
    }
}

/// score[n] = up_k keys[n] . up_q queries[n], or up_k keys[n] itself.
__global__ void
__launch_bounds__(kThreads) score_kernel(ScoreArguments args) {
    __shared__ float parts[kWarps][kBlocks];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first = int64_t{blockIdx.x} * kBlocks;
    const int count = static_cast<int>(min(int64_t{kBlocks}, args.num_blocks - first));
    const float* keys = args.keys + first * args.key_units;
    float scores[kBlocks] = {}, key[kBlocks], query[kBlocks];
    for (int64_t output = warp; output < args.outputs; output += kWarps) {
        dot_rows(args.key_up, output, keys, count, args.key_units, lane, key);
        if (args.queries != nullptr) {
            dot_rows(args.query_up, output, args.queries + first * args.query_units, count,
                     args.query_units, lane, query);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            scores[b] += args.queries != nullptr ? key[b] * query[b] : key[b];
        }
    }
    if (lane == 0) {
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < kBlocks; ++b) parts[warp][b] = scores[b];
    }
    __syncthreads();
    if (threadIdx.x < count) {
        float sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += parts[w][threadIdx.x];
        args.scores[first + threadIdx.x] = sum;
    }
}

}  // namespace

int64_t scratch_bytes(const PredictorParams& params) {
    return count_scratch_bytes<ForwardPlan>(params);
}

void launch(const PredictorParams& params, cudaStream_t stream) {
    constexpr const char* kOp = "predictor";
    Arena arena(params.scratch);
    const ForwardPlan plan(params, arena);
    if (plan.blocks == 0) return;
    mean_activations(kOp, plan, stream);
    const Net &key = plan.nets[0], &query = plan.nets[1];
    const ScoreArguments args{key.means,
                              query.visible,
                              FloatReader(key.up),
                              FloatReader(query.up),
                              key.second,
                              query.second,
                              key.output,
                              plan.blocks,
                              params.scores.as<float>()};
    score_kernel<<<static_cast<unsigned>(ceil_div<int64_t>(plan.blocks, kBlocks)), kThreads, 0,
                   stream>>>(args);
    check_launch(kOp);
}

}  // namespace lemo::cuda::predictor::portable
