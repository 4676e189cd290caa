// Whether the kernels for compute capability 9.0 can run.
#pragma once

#include "common/launch.h"

namespace lemo::cuda {

/// Whether this build has the kernels for compute capability 9.0, and the current GPU is of it.
inline bool supports_hopper_kernels(const char* op) {
#ifdef LEMO_WITH_HOPPER
    int device = 0, major = 0, minor = 0;
    check_status(op, cudaGetDevice(&device));
    check_status(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check_status(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return major == 9 && minor == 0;
#else
    static_cast<void>(op);
    return false;
#endif
}

}  // namespace lemo::cuda
