// segment_attention on CUDA: what is supported, and which kernels run.
#include "lemo/segment_attention.h"

#include <string>

#include "common/hopper_support.h"
#include "common/launch.h"
#include "common/vector.h"
#include "segment_attention/hopper/kernels.h"
#include "segment_attention/portable/kernels.h"

namespace lemo {
namespace {

namespace hopper = cuda::segment_attention::hopper;
namespace portable = cuda::segment_attention::portable;

constexpr const char* kForward = "segment_attention";
constexpr const char* kBackward = "segment_attention_backward";
constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kVectorElements = 8;  // 16 bytes
// What the large tiles of the portable backward pass take.
constexpr int kLargeSharedBytes = 162 * 1024;

/// Which kernels run; named in SegmentAttentionParams::kernel.
enum class Tier { kHopper, kPortable, kPortableSmall };

/// Checks what the CUDA kernels support, and picks the tier.
Tier choose_tier(const char* op, const SegmentAttentionParams& p) {
    const Checker check(op);
    check.that(p.q.dtype == DType::kBFloat16 || p.q.dtype == DType::kFloat16, "q",
               "bfloat16 or float16 on a GPU", describe(p.q), ErrorKind::kUnsupported);
    const int64_t head_dim = p.q.size(2);
    check.that(
        head_dim % kVectorElements == 0 && head_dim >= kVectorElements && head_dim <= kMaxHeadDim,
        "q", "a head size that is a multiple of 8 from 8 to 128 on a GPU", std::to_string(head_dim),
        ErrorKind::kUnsupported);
    check.that(p.v.size(2) == head_dim, "v", "the head size of 'q' on a GPU",
               std::to_string(p.v.size(2)), ErrorKind::kUnsupported);
    check.that(p.softcap == 0, "softcap", "0 on a GPU", std::to_string(p.softcap),
               ErrorKind::kUnsupported);
    check.that(!p.sinks, "sinks", "None on a GPU", "a tensor", ErrorKind::kUnsupported);
    const auto got = [&] { return "'" + std::string(p.kernel) + "'"; };
    if (p.kernel == "auto") {
        if (cuda::supports_hopper_kernels(op)) return Tier::kHopper;
        const bool small = cuda::current_gpu(op).block_shared_bytes < kLargeSharedBytes;
        return small ? Tier::kPortableSmall : Tier::kPortable;
    }
    if (p.kernel == "portable") return Tier::kPortable;
    if (p.kernel == "portable-small") return Tier::kPortableSmall;
    check.that(p.kernel == "hopper", "kernel",
               "one of 'auto', 'hopper', 'portable', 'portable-small' on a GPU", got());
    check.that(cuda::supports_hopper_kernels(op), "kernel",
               "'auto', 'portable' or 'portable-small' here: 'hopper' needs a GPU of compute "
               "capability 9.0 and a build for it",
               got(), ErrorKind::kUnsupported);
    return Tier::kHopper;
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

}  // namespace

int64_t segment_attention_scratch_bytes(const SegmentAttentionParams& params) {
    [[maybe_unused]] const Tier tier = choose_tier(kForward, params);
    return dispatch(params, [&]<typename Element, int kHeadDim>(Element, cuda::Int<kHeadDim>) {
#ifdef LEMO_WITH_HOPPER
        if (tier == Tier::kHopper) {
            return hopper::ForwardPass<Element, kHeadDim>::scratch_bytes(params);
        }
#endif
        return portable::ForwardPass<Element, kHeadDim>::scratch_bytes(params);
    });
}

int64_t segment_attention_scratch_bytes(const SegmentAttentionBackwardParams& params) {
    const Tier tier = choose_tier(kBackward, params.forward);
    return dispatch(params.forward,
                    [&]<typename Element, int kHeadDim>(Element, cuda::Int<kHeadDim>) {
#ifdef LEMO_WITH_HOPPER
                        if (tier == Tier::kHopper) {
                            return hopper::BackwardPass<Element, kHeadDim>::scratch_bytes(params);
                        }
#endif
                        return portable::BackwardPass<Element, kHeadDim>::scratch_bytes(
                            params, tier == Tier::kPortableSmall);
                    });
}

void segment_attention_cuda(const SegmentAttentionParams& params, void* cuda_stream) {
    [[maybe_unused]] const Tier tier = choose_tier(kForward, params);
    if (params.q.size(0) == 0) return;
    const auto stream = static_cast<cudaStream_t>(cuda_stream);
    dispatch(params, [&]<typename Element, int kHeadDim>(Element, cuda::Int<kHeadDim>) {
#ifdef LEMO_WITH_HOPPER
        if (tier == Tier::kHopper) {
            return hopper::ForwardPass<Element, kHeadDim>::launch(params, stream);
        }
#endif
        portable::ForwardPass<Element, kHeadDim>::launch(params, stream);
    });
}

void segment_attention_backward_cuda(const SegmentAttentionBackwardParams& params,
                                     void* cuda_stream) {
    const Tier tier = choose_tier(kBackward, params.forward);
    if (params.forward.cu_q.size(0) < 2) return;  // no sequences, no rows
    const auto stream = static_cast<cudaStream_t>(cuda_stream);
    dispatch(params.forward, [&]<typename Element, int kHeadDim>(Element, cuda::Int<kHeadDim>) {
#ifdef LEMO_WITH_HOPPER
        if (tier == Tier::kHopper) {
            return hopper::BackwardPass<Element, kHeadDim>::launch(params, stream);
        }
#endif
        portable::BackwardPass<Element, kHeadDim>::launch(params, tier == Tier::kPortableSmall,
                                                          stream);
    });
}

}  // namespace lemo
