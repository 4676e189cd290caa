#include "segment_attention/portable/forward.h"

namespace lemo::cuda::segment_attention::portable {

template struct ForwardPass<cutlass::bfloat16_t, 192, 128>;
template struct ForwardPass<cutlass::half_t, 192, 128>;

}  // namespace lemo::cuda::segment_attention::portable
