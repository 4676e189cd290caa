// residual_scatter: x[rows] += y in place. gather_rows, its adjoint: y = x[rows].
#pragma once

#include "lemo/tensor.h"

namespace lemo {

struct ResidualScatterParams {
    Tensor x;     // [T, H] float, updated in place
    Tensor y;     // [R, H] float, may differ from x in dtype
    Tensor rows;  // [R] int32, strictly ascending; absent: R == T and every row
};

struct GatherRowsParams {
    Tensor x;     // [T, H] float
    Tensor rows;  // [R] int32, strictly ascending; absent: every row
    Tensor y;     // [R, H] float of x's dtype, written
};

void check(const ResidualScatterParams& params);
void check(const GatherRowsParams& params);

void residual_scatter_cpu(const ResidualScatterParams& params);
void gather_rows_cpu(const GatherRowsParams& params);

/// `stream` is a cudaStream_t. Asynchronous; one writer for each row.
void residual_scatter_cuda(const ResidualScatterParams& params, void* stream);
void gather_rows_cuda(const GatherRowsParams& params, void* stream);

}  // namespace lemo
