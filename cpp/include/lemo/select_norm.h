// select_norm: y = norm(x[rows]) * weight (+ bias), RMSNorm or LayerNorm; the selection rides in
// the load.
#pragma once

#include <string_view>

#include "lemo/tensor.h"

namespace lemo {

struct SelectNormParams {
    Tensor x;               // [T, H] float
    Tensor rows;            // [R] int32, strictly ascending; absent: R == T and every row
    Tensor weight;          // [H] float, may differ from x in dtype
    Tensor bias;            // [H] float; absent for "rms", optional for "layer"
    double eps;             // added to the variance
    std::string_view kind;  // "rms" or "layer"
    Tensor y;               // [R, H] of x's dtype, written
    Tensor x_rows;          // [R, H] of x's dtype, written with x[rows]; absent: not kept
    Tensor mean;            // [R] float32, written for "layer"; [0] for "rms"
    Tensor rstd;            // [R] float32, written: 1 / sqrt(variance + eps)
};

struct SelectNormBackwardParams {
    Tensor dy;              // [R, H] float
    Tensor x_rows;          // [R, H] of dy's dtype
    Tensor rows;            // [R] int32, strictly ascending; absent: every row
    Tensor weight;          // [H] float
    Tensor mean;            // [R] float32 for "layer"; [0] for "rms"
    Tensor rstd;            // [R] float32
    std::string_view kind;  // "rms" or "layer"
    Tensor dx;              // [T, H] of dy's dtype; the gradient is added into its rows
    Tensor dweight;         // [H] float32, written; absent: not wanted
    Tensor dbias;           // [H] float32, written; absent: not wanted
};

void check(const SelectNormParams& params);
void check(const SelectNormBackwardParams& params);

void select_norm_cpu(const SelectNormParams& params);
void select_norm_backward_cpu(const SelectNormBackwardParams& params);

/// `stream` is a cudaStream_t. Asynchronous; one writer for each row, bit-equal over repeats.
void select_norm_cuda(const SelectNormParams& params, void* stream);
void select_norm_backward_cuda(const SelectNormBackwardParams& params, void* stream);

}  // namespace lemo
