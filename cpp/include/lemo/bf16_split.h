// bf16_split: fp32 numbers as sums of two in bf16, so that products with them run on tensor cores
// and keep 16 bits of them (arXiv 1904.06376, with two parts).
#pragma once

#include <vector>

#include "lemo/tensor.h"

namespace lemo {

/// Of the numbers s = scale * x, high = bf16(s) and low = bf16(s - high). The blocks of a row of y
/// are (high, high, low) where it is a product's left operand, and (high, low, high) where it is
/// the right one: the product of both is high * high + high * low + low * high.
struct Bf16SplitParams {
    Tensor x;  // [R, C] float32, or [R, 3, C], of which the first two blocks are added up: what a
               // product with a right operand is, block by block
    Tensor y;  // [R, 3, C] bfloat16, written
    float scale;
    bool left;
};

/// Several matrices at once, each a right operand with scale 1.
struct Bf16SplitAllParams {
    std::vector<Tensor> xs;  // [R_i, C_i] float32
    Tensor y;                // [3 * elements of all] bfloat16, written: [R_i, 3, C_i] of one behind
                             // those of another
};

void check(const Bf16SplitParams& params);
void check(const Bf16SplitAllParams& params);

void bf16_split_cpu(const Bf16SplitParams& params);
void bf16_split_all_cpu(const Bf16SplitAllParams& params);

/// `stream` is a cudaStream_t. Asynchronous; one writer for each element.
void bf16_split_cuda(const Bf16SplitParams& params, void* stream);
void bf16_split_all_cuda(const Bf16SplitAllParams& params, void* stream);

}  // namespace lemo
