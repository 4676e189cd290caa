#include "segment_attention/hopper/forward_launch.h"

namespace lemo::cuda::segment_attention::hopper {

template struct ForwardPass<cutlass::bfloat16_t, 256, 256, false>;
template struct ForwardPass<cutlass::half_t, 256, 256, false>;

}  // namespace lemo::cuda::segment_attention::hopper
