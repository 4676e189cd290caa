// linear_cross_entropy: loss of a vocabulary projection and its gradients, a segment at a time.
#pragma once

#include <cstdint>

#include "lemo/tensor.h"

namespace lemo {

/// Sum over the labels that are not `ignore_index` of the cross entropy of hidden @ weight.T +
/// bias, and the gradients of that sum, computed while a segment's logits are there.
struct LinearCrossEntropyParams {
    Tensor hidden;  // [R, H] float
    Tensor weight;  // [V, H] float, may differ from hidden in dtype
    Tensor bias;    // [V] float; may be absent
    Tensor labels;  // [R] int64, in [0, V) or ignore_index
    int64_t ignore_index = -100;
    int64_t segment_rows = 1;  // used rows whose fp32 logits are held at a time
    Tensor loss;               // [] fp32, written
    Tensor count;              // [] int64, labels used, written
    Tensor dhidden;            // [R, H] of hidden's dtype, written; rows of ignored labels are 0
    Tensor dweight;            // [V, H] of weight's dtype, written; absent: not computed
    Tensor dbias;              // [V] of bias's dtype, written; absent: not computed
};

void check(const LinearCrossEntropyParams& params);

void linear_cross_entropy_cpu(const LinearCrossEntropyParams& params);

}  // namespace lemo
