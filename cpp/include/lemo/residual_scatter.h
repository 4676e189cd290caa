// residual_scatter: x[rows] += y in place, and its adjoint, the gather dy = dx[rows].
#pragma once

#include "lemo/tensor.h"

namespace lemo {

struct ResidualScatterParams {
    Tensor x;     // [T, H] float, updated in place
    Tensor y;     // [R, H] float, may differ from x in dtype
    Tensor rows;  // [R] int32, strictly ascending; absent: R == T and every row
};

struct ResidualGatherParams {
    Tensor dx;    // [T, H] float
    Tensor rows;  // [R] int32, strictly ascending; absent: every row
    Tensor dy;    // [R, H] float of dx's dtype, written
};

void check(const ResidualScatterParams& params);
void check(const ResidualGatherParams& params);

void residual_scatter_cpu(const ResidualScatterParams& params);
void residual_gather_cpu(const ResidualGatherParams& params);

/// `stream` is a cudaStream_t. Asynchronous; one writer for each row.
void residual_scatter_cuda(const ResidualScatterParams& params, void* stream);
void residual_gather_cuda(const ResidualGatherParams& params, void* stream);

}  // namespace lemo
