// The two passes of predictor, for every GPU of compute capability 8.0 and newer.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lemo/predictor.h"

namespace lemo::cuda::predictor::portable {

int64_t scratch_bytes(const PredictorParams& params);
int64_t scratch_bytes(const PredictorBackwardParams& params);

void launch(const PredictorParams& params, cudaStream_t stream);
void launch(const PredictorBackwardParams& params, cudaStream_t stream);

}  // namespace lemo::cuda::predictor::portable
