// segment_attention on CUDA: what is supported, and which kernels run.
#include "lemo/segment_attention.h"

#include <string>

#include "common/launch.h"
#include "common/vector.h"
#include "segment_attention/kernels.h"
#include "segment_attention/plan.h"

namespace lemo {
namespace {

constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kVectorElements = 8;  // 16 bytes
// What the large tiles of the backward pass take.
constexpr int kLargeSharedBytes = 162 * 1024;

void check_supported(const char* op, const SegmentAttentionParams& p) {
    const Checker check(op);
    check.that(p.q.dtype == DType::kBFloat16 || p.q.dtype == DType::kFloat16, "q",
               "bfloat16 or float16 on a GPU", describe(p.q), ErrorKind::kUnsupported);
    const int64_t head_dim = p.q.size(2);
    check.that(head_dim % kVectorElements == 0 && head_dim >= kVectorElements &&
                   head_dim <= kMaxHeadDim,
               "q", "a head size that is a multiple of 8 from 8 to 128 on a GPU",
               std::to_string(head_dim), ErrorKind::kUnsupported);
    check.that(p.kernel == "auto" || p.kernel == "portable" || p.kernel == "portable-small",
               "kernel", "one of 'auto', 'portable', 'portable-small' on a GPU",
               "'" + std::string(p.kernel) + "'");
}

/// Calls `body(Element{}, head size of the kernel)`.
template <typename Body>
auto dispatch(const SegmentAttentionParams& p, Body&& body) {
    const auto with_head_dim = [&]<typename Element>(Element element) {
        if (p.q.size(2) <= 64) return body(element, cuda::Int<64>{});
        return body(element, cuda::Int<128>{});
    };
    if (p.q.dtype == DType::kBFloat16) return with_head_dim(cutlass::bfloat16_t{});
    return with_head_dim(cutlass::half_t{});
}

bool takes_small_tiles(const SegmentAttentionParams& p) {
    if (p.kernel != "auto") return p.kernel == "portable-small";
    int device = 0, shared_bytes = 0;
    cuda::check_status("segment_attention_backward", cudaGetDevice(&device));
    cuda::check_status("segment_attention_backward",
                       cudaDeviceGetAttribute(&shared_bytes,
                                              cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return shared_bytes < kLargeSharedBytes;
}

}  // namespace

int64_t segment_attention_scratch_bytes(const SegmentAttentionParams& params) {
    return cuda::plan_bytes(params);
}

int64_t segment_attention_scratch_bytes(const SegmentAttentionBackwardParams& params) {
    check_supported("segment_attention_backward", params.forward);
    return dispatch(params.forward, [&]<typename Element, int kHeadDim>(
                                        Element, cuda::Int<kHeadDim>) {
        return cuda::BackwardPass<Element, kHeadDim>::scratch_bytes(
            params, takes_small_tiles(params.forward));
    });
}

void segment_attention_cuda(const SegmentAttentionParams& params, void* stream) {
    check_supported("segment_attention", params);
    if (params.q.size(0) == 0) return;
    dispatch(params, [&]<typename Element, int kHeadDim>(Element, cuda::Int<kHeadDim>) {
        cuda::launch_forward<Element, kHeadDim>(params, static_cast<cudaStream_t>(stream));
    });
}

void segment_attention_backward_cuda(const SegmentAttentionBackwardParams& params, void* stream) {
    check_supported("segment_attention_backward", params.forward);
    if (params.forward.cu_q.size(0) < 2) return;  // no sequences, no rows
    dispatch(params.forward, [&]<typename Element, int kHeadDim>(Element, cuda::Int<kHeadDim>) {
        cuda::BackwardPass<Element, kHeadDim>::launch(params, takes_small_tiles(params.forward),
                                                      static_cast<cudaStream_t>(stream));
    });
}

}  // namespace lemo
