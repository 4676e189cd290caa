// predictor on CUDA. One tier, which takes everything that `check` lets through.
#include "lemo/predictor.h"

#include "predictor/portable/passes.h"

namespace lemo {

namespace portable = cuda::predictor::portable;

int64_t predictor_scratch_bytes(const PredictorParams& params) {
    return portable::scratch_bytes(params);
}

int64_t predictor_scratch_bytes(const PredictorBackwardParams& params) {
    return portable::scratch_bytes(params);
}

void predictor_cuda(const PredictorParams& params, void* stream) {
    portable::launch(params, static_cast<cudaStream_t>(stream));
}

void predictor_backward_cuda(const PredictorBackwardParams& params, void* stream) {
    portable::launch(params, static_cast<cudaStream_t>(stream));
}

}  // namespace lemo
