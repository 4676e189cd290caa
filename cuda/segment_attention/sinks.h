// The gradient of sinks.
#pragma once

#include <cuda_runtime.h>

#include "common/exp2.h"
#include "lemo/segment_attention.h"

namespace lemo::cuda::segment_attention {

/// What one row adds to the gradient of its head's sink, which has no value: its probability times
/// 0 - delta. `log2_sum`: log2 of the row's sum of exponentials; `delta`: the sum of out * dout.
__device__ __forceinline__ float sink_term(float sink, float log2_sum, float delta) {
    // A row without any score: the difference would be NaN.
    if (isinf(log2_sum)) return 0.0f;
    return -exp2_approximate(fmaf(sink, float(M_LOG2E), -log2_sum)) * delta;
}

/// Sums `terms` [heads, queries] over the queries into the gradient of the sinks, always in one
/// order. Nothing without sinks.
void sum_sink_terms(const SegmentAttentionBackwardParams& params, const float* terms,
                    cudaStream_t stream);

}  // namespace lemo::cuda::segment_attention
