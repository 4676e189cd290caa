#include "segment_attention/sinks.h"

#include "common/launch.h"
#include "common/reduce.h"

namespace lemo::cuda::segment_attention {
namespace {

constexpr int kThreads = 512;

/// Grid: heads.
__global__ void
__launch_bounds__(kThreads)
sum_sink_terms_kernel(const float* __restrict__ terms, int64_t num_queries,
                      float* __restrict__ dsinks) {
    __shared__ float scratch[kReduceScratch];
    terms += blockIdx.x * num_queries;
    float sum = 0;
    for (int64_t query = threadIdx.x; query < num_queries; query += kThreads) sum += terms[query];
    sum = block_sum<kThreads>(sum, scratch);
    if (threadIdx.x == 0) dsinks[blockIdx.x] = sum;
}

}  // namespace

void sum_sink_terms(const SegmentAttentionBackwardParams& params, const float* terms,
                    cudaStream_t stream) {
    if (!params.dsinks) return;
    const Tensor& q = params.forward.q;
    sum_sink_terms_kernel<<<static_cast<unsigned>(q.size(1)), kThreads, 0, stream>>>(
        terms, q.size(0), params.dsinks.as<float>());
    check_launch("segment_attention_backward");
}

}  // namespace lemo::cuda::segment_attention
