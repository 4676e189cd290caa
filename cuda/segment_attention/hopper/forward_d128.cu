#include "segment_attention/hopper/forward_launch.h"

namespace lemo::cuda::segment_attention::hopper {

template struct ForwardPass<cutlass::bfloat16_t, 128, 128, false>;
template struct ForwardPass<cutlass::half_t, 128, 128, false>;

}  // namespace lemo::cuda::segment_attention::hopper
