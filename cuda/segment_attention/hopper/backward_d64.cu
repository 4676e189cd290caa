#include "segment_attention/hopper/backward.h"

namespace lemo::cuda::hopper {

template struct BackwardPass<cutlass::bfloat16_t, 64>;
template struct BackwardPass<cutlass::half_t, 64>;

}  // namespace lemo::cuda::hopper
