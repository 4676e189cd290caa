// swiglu: y = silu(gate) * up, and its backward pass in the storage of its inputs.
#pragma once

#include "lemo/tensor.h"

namespace lemo {

struct SwigluParams {
    Tensor gate;  // [R, F] float
    Tensor up;    // [R, F] of gate's dtype
    Tensor y;     // [R, F] of gate's dtype, written
};

struct SwigluFp8Params {
    SwigluParams product;
    Tensor scales;    // [R, 1] float32, written: those of the rows of y in e4m3 (lemo/fp8.h)
    uint8_t* values;  // [R, F], written: y in e4m3
};

struct SwigluBackwardParams {
    Tensor dout;  // [R, F] of gate's dtype
    Tensor gate;  // [R, F] float; overwritten with its gradient
    Tensor up;    // [R, F] of gate's dtype; overwritten with its gradient
};

void check(const SwigluParams& params);
void check(const SwigluFp8Params& params);
void check(const SwigluBackwardParams& params);

void swiglu_cpu(const SwigluParams& params);
void swiglu_fp8_cpu(const SwigluFp8Params& params);
void swiglu_backward_cpu(const SwigluBackwardParams& params);

/// `stream` is a cudaStream_t. Asynchronous; one writer for each element.
void swiglu_cuda(const SwigluParams& params, void* stream);
void swiglu_fp8_cuda(const SwigluFp8Params& params, void* stream);
void swiglu_backward_cuda(const SwigluBackwardParams& params, void* stream);

}  // namespace lemo
