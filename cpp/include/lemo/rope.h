// rope: rotary embedding of heads, y = x * cos + swap(x) * sin, by tables of the whole batch.
#pragma once

#include "lemo/tensor.h"

namespace lemo {

/// With the halves (x1, x2) of a head, (c1, c2) of cos and (s1, s2) of sin:
/// y = (x1 c1 - x2 s1, x2 c2 + x1 s2), or by the transposed map (x1 c1 + x2 s2, x2 c2 - x1 s1).
struct RopeParams {
    Tensor x;         // [R, heads, D] float, D even
    Tensor cos;       // [P, D] float
    Tensor sin;       // [P, D] float of cos's dtype
    Tensor rows;      // [R] int32, each row's row of the tables; absent: P == R
    bool transposed;  // the gradient's map
    Tensor y;         // [R, heads, D] of x's dtype, written
};

void check(const RopeParams& params);

void rope_cpu(const RopeParams& params);

/// `stream` is a cudaStream_t. Asynchronous; one writer for each row.
void rope_cuda(const RopeParams& params, void* stream);

}  // namespace lemo
