// segment_attention on CUDA: what is supported, and which kernels run.
#include "lemo/segment_attention.h"

#include <string>

#include "common/hopper_support.h"
#include "common/launch.h"
#include "common/vector.h"
#include "segment_attention/hopper/kernels.h"
#include "segment_attention/kernels.h"
#include "segment_attention/plan.h"

namespace lemo {
namespace {

constexpr const char* kForward = "segment_attention";
constexpr const char* kBackward = "segment_attention_backward";
constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kVectorElements = 8;  // 16 bytes
// What the large tiles of the portable backward pass take.
constexpr int kLargeSharedBytes = 162 * 1024;

/// Which kernels run; named in SegmentAttentionParams::kernel.
enum class Kernels { kHopper, kPortable, kPortableSmall };

/// Checks what the CUDA kernels support.
Kernels choose_kernels(const char* op, const SegmentAttentionParams& p) {
    const Checker check(op);
    check.that(p.q.dtype == DType::kBFloat16 || p.q.dtype == DType::kFloat16, "q",
               "bfloat16 or float16 on a GPU", describe(p.q), ErrorKind::kUnsupported);
    const int64_t head_dim = p.q.size(2);
    check.that(head_dim % kVectorElements == 0 && head_dim >= kVectorElements &&
                   head_dim <= kMaxHeadDim,
               "q", "a head size that is a multiple of 8 from 8 to 128 on a GPU",
               std::to_string(head_dim), ErrorKind::kUnsupported);
    const auto got = [&] { return "'" + std::string(p.kernel) + "'"; };
    if (p.kernel == "auto") {
        if (cuda::supports_hopper_kernels(op)) return Kernels::kHopper;
        const bool small = cuda::current_gpu(op).block_shared_bytes < kLargeSharedBytes;
        return small ? Kernels::kPortableSmall : Kernels::kPortable;
    }
    if (p.kernel == "portable") return Kernels::kPortable;
    if (p.kernel == "portable-small") return Kernels::kPortableSmall;
    check.that(p.kernel == "hopper", "kernel",
               "one of 'auto', 'hopper', 'portable', 'portable-small' on a GPU", got());
    check.that(cuda::supports_hopper_kernels(op), "kernel",
               "'auto', 'portable' or 'portable-small' here: 'hopper' needs a GPU of compute "
               "capability 9.0 and a build for it",
               got(), ErrorKind::kUnsupported);
    return Kernels::kHopper;
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
    return cuda::hopper::kWorkBytes + cuda::plan_bytes(params);
}

int64_t segment_attention_scratch_bytes(const SegmentAttentionBackwardParams& params) {
    const Kernels kernels = choose_kernels(kBackward, params.forward);
    return dispatch(params.forward, [&]<typename Element, int kHeadDim>(
                                        Element, cuda::Int<kHeadDim>) {
#ifdef LEMO_WITH_HOPPER
        if (kernels == Kernels::kHopper) {
            return cuda::hopper::BackwardPass<Element, kHeadDim>::scratch_bytes(params);
        }
#endif
        return cuda::BackwardPass<Element, kHeadDim>::scratch_bytes(
            params, kernels == Kernels::kPortableSmall);
    });
}

void segment_attention_cuda(const SegmentAttentionParams& params, void* stream) {
    [[maybe_unused]] const Kernels kernels = choose_kernels(kForward, params);
    if (params.q.size(0) == 0) return;
    dispatch(params, [&]<typename Element, int kHeadDim>(Element, cuda::Int<kHeadDim>) {
#ifdef LEMO_WITH_HOPPER
        if (kernels == Kernels::kHopper) {
            return cuda::hopper::launch_forward<Element, kHeadDim>(
                params, static_cast<cudaStream_t>(stream));
        }
#endif
        cuda::launch_forward<Element, kHeadDim>(params, static_cast<cudaStream_t>(stream));
    });
}

void segment_attention_backward_cuda(const SegmentAttentionBackwardParams& params, void* stream) {
    const Kernels kernels = choose_kernels(kBackward, params.forward);
    if (params.forward.cu_q.size(0) < 2) return;  // no sequences, no rows
    dispatch(params.forward, [&]<typename Element, int kHeadDim>(Element, cuda::Int<kHeadDim>) {
#ifdef LEMO_WITH_HOPPER
        if (kernels == Kernels::kHopper) {
            return cuda::hopper::BackwardPass<Element, kHeadDim>::launch(
                params, static_cast<cudaStream_t>(stream));
        }
#endif
        cuda::BackwardPass<Element, kHeadDim>::launch(params, kernels == Kernels::kPortableSmall,
                                                      static_cast<cudaStream_t>(stream));
    });
}

}  // namespace lemo
