// linear_cross_entropy: loss of a vocabulary projection and its gradients, a loss chunk at a time.
#pragma once

#include <cstdint>

#include "lemo/tensor.h"

namespace lemo {

/// Sum over the labels that are not `ignore_index` of the cross entropy of hidden @ weight.T +
/// bias, and the gradients of that sum, computed while a loss chunk's logits are there.
///
/// A label that is neither in [0, V) nor `ignore_index` fails `check` on the CPU. Labels on a GPU
/// are not read back: there the loss and every gradient that the row takes part in become NaN.
struct LinearCrossEntropyParams {
    Tensor hidden;  // [R, H] float
    Tensor weight;  // [V, H] float, may differ from hidden in dtype
    Tensor bias;    // [V] float; may be absent
    Tensor labels;  // [R] int64, in [0, V) or ignore_index
    int64_t ignore_index = -100;
    // Rows whose logits are held at a time: on the CPU used rows, in fp32; on a GPU all rows, in
    // the dtype of hidden.
    int64_t chunk_rows = 1;
    Tensor loss;   // [] fp32, written
    Tensor count;  // [] int64, labels used, written
    // [R, H] of hidden's dtype, written; rows of ignored labels are 0; absent: not computed
    Tensor dhidden;
    Tensor dweight;  // [V, H] of weight's dtype, written; absent: not computed
    Tensor dbias;    // [V] of bias's dtype, written; absent: not computed
    // On a GPU: linear_cross_entropy_scratch_bytes bytes of its memory, from a 256-byte boundary
    // on.
    void* scratch = nullptr;
};

void check(const LinearCrossEntropyParams& params);

void linear_cross_entropy_cpu(const LinearCrossEntropyParams& params);

/// Scratch of a call on CUDA: mostly the logits of a loss chunk, and sums of weight gradients in
/// fp32. `scratch` itself is not looked at. Throws Error where CUDA does not support the dtypes.
int64_t linear_cross_entropy_scratch_bytes(const LinearCrossEntropyParams& params);

void linear_cross_entropy_cuda(const LinearCrossEntropyParams& params, void* stream);

}  // namespace lemo
