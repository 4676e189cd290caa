// Descriptions of tensors in global memory for the tensor copies of compute capability 9.0.
#pragma once

#include <cuda.h>

#include "lemo/tensor.h"

namespace lemo::cuda {

/// Columns of one tensor copy: 128 bytes of 2-byte elements, the width of the swizzle.
inline constexpr int kCopyColumns = 64;

/// Describes `tensor` [rows, heads, head_dim] of bf16 or fp16, contiguous and 16-byte aligned, for
/// copies of boxes of `box_rows` rows, one head and kCopyColumns columns into tiles swizzled by 128
/// bytes. What lies beyond the tensor is read as zero. No box may be copied of an empty tensor.
CUtensorMap make_tensor_map(const char* op, const Tensor& tensor, int box_rows);

}  // namespace lemo::cuda
