// The driver of linear_cross_entropy: for one loss chunk after the other, matrix products by cuBLAS
// and the kernels between them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lemo/linear_cross_entropy.h"

namespace lemo::cuda::linear_cross_entropy::portable {

int64_t scratch_bytes(const LinearCrossEntropyParams& params);

void launch(const LinearCrossEntropyParams& params, cudaStream_t stream);

}  // namespace lemo::cuda::linear_cross_entropy::portable
