#include "segment_attention/portable/backward.h"

namespace lemo::cuda::segment_attention::portable {

template struct BackwardPass<cutlass::bfloat16_t, 256, 256>;
template struct BackwardPass<cutlass::half_t, 256, 256>;

}  // namespace lemo::cuda::segment_attention::portable
