#include "segment_attention/forward.h"

namespace lemo::cuda {

template void launch_forward<cutlass::bfloat16_t, 64>(const SegmentAttentionParams&, cudaStream_t);
template void launch_forward<cutlass::half_t, 64>(const SegmentAttentionParams&, cudaStream_t);

}  // namespace lemo::cuda
