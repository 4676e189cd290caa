// fp8_rows: rows in 8 bits (e4m3, arXiv 2209.05433), each with a scale of its own; fp8_transpose:
// such values with rows and columns exchanged, as products on tensor cores read them.
#pragma once

#include "lemo/fp8.h"
#include "lemo/tensor.h"

namespace lemo {

struct Fp8RowsParams {
    Tensor x;         // [R, C] float
    Tensor columns;   // [C] float32, what columns are multiplied with first; absent: with 1
    Tensor scales;    // [R, 1] float32, written: the row's largest magnitude / 448
    uint8_t* values;  // [R, C] e4m3, written: x * columns / scales, to nearest even
};

struct Fp8TransposeParams {
    const uint8_t* x;       // [R, C] e4m3
    uint8_t* y;             // [C, R] e4m3, written
    int64_t rows, columns;  // R and C, multiples of 16
};

void check(const Fp8RowsParams& params);
void check(const Fp8TransposeParams& params);

void fp8_rows_cpu(const Fp8RowsParams& params);
void fp8_transpose_cpu(const Fp8TransposeParams& params);

/// `stream` is a cudaStream_t. Asynchronous; bit-equal over repeats, and to the CPU's results.
void fp8_rows_cuda(const Fp8RowsParams& params, void* stream);
void fp8_transpose_cuda(const Fp8TransposeParams& params, void* stream);

}  // namespace lemo
