#include "segment_attention/hopper/forward.h"

namespace lemo::cuda::hopper {

template void launch_forward<cutlass::bfloat16_t, 64>(const SegmentAttentionParams&, cudaStream_t);
template void launch_forward<cutlass::half_t, 64>(const SegmentAttentionParams&, cudaStream_t);

}  // namespace lemo::cuda::hopper
