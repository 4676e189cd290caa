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
    __device__ RowEnd(float max, float sum, const float* sinks, int head) {
        if (sinks == nullptr) {
            factor = sum == 0.0f ? 0.0f : 1.0f / sum;
            log_sum = sum == 0.0f ? -INFINITY : max + logf(sum);
            return;
        }
        const float sink = sinks[head];
        if (sum == 0.0f) {
            factor = 0.0f;
            log_sum = sink;
            return;
        }
        const float top = fmaxf(max, sink);
        const float decay = expf(max - top);
        const float total = fmaf(sum, decay, expf(sink - top));
        factor = decay / total;
        log_sum = top + logf(total);
    }
};

}  // namespace lemo::cuda::segment_attention
