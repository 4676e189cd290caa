#include "segment_attention/hopper/backward_launch.h"

namespace lemo::cuda::segment_attention::hopper {

template struct BackwardPass<cutlass::bfloat16_t, 192, 128, false>;
template struct BackwardPass<cutlass::half_t, 192, 128, false>;

}  // namespace lemo::cuda::segment_attention::hopper
