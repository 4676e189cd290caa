#include "segment_attention/hopper/backward_launch.h"

namespace lemo::cuda::segment_attention::hopper {

template struct BackwardPass<cutlass::bfloat16_t, 128, 128, true>;
template struct BackwardPass<cutlass::half_t, 128, 128, true>;

}  // namespace lemo::cuda::segment_attention::hopper
