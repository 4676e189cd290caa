// The end of a row's softmax, with or without a sink.
#pragma once

#include <cmath>

#include <cuda_runtime.h>

namespace lemo::cuda::segment_attention {

/// What the sum of a row's values is multiplied by, and the logarithm of its sum of exponentials.
struct RowEnd {
    float factor;
    float log_sum;

    /// `sum`: of exp(score - max) over the keys, 0 where the row sees none. `sinks`: the further
    /// score of each head, or null.
    __device__ __forceinline__ RowEnd(float max, float sum, const float* sinks, int head)
        : factor(sum == 0.0f ? 0.0f : 1.0f / sum),
          log_sum(sum == 0.0f ? -INFINITY : max + logf(sum)) {
        if (sinks != nullptr) add(sinks[head]);
    }

private:
    __device__ __forceinline__ void add(float sink) {
        const float top = fmaxf(log_sum, sink);
        if (top == -INFINITY) return;  // neither counts; differences would be NaN
        const float total = top + logf(expf(log_sum - top) + expf(sink - top));
        factor *= expf(log_sum - total);
        log_sum = total;
    }
};

}  // namespace lemo::cuda::segment_attention
