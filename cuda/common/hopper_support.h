// Whether the kernels for compute capability 9.0 can run.
#pragma once

#include "common/launch.h"

namespace lemo::cuda {

/// Whether this build has the kernels for compute capability 9.0, and the current GPU is of it.
inline bool supports_hopper_kernels(const char* op) {
#ifdef LEMO_WITH_HOPPER
    return current_gpu(op).compute_capability == 90;
#else
    static_cast<void>(op);
    return false;
#endif
}

}  // namespace lemo::cuda
