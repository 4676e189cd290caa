// segment_attention on CUDA: what is supported, and which kernels run.
#include "lemo/segment_attention.h"

#include "common/hopper_support.h"
#include "common/launch.h"
#include "common/vector.h"
#include "segment_attention/hopper/kernels.h"
#include "segment_attention/portable/kernels.h"
#include "segment_attention/sinks.h"

namespace lemo {
namespace {

namespace hopper = cuda::segment_attention::hopper;
namespace portable = cuda::segment_attention::portable;

constexpr const char* kForward = "segment_attention";
constexpr const char* kBackward = "segment_attention_backward";
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kVectorElements = 8;  // 16 bytes

/// Which kernels run; named in SegmentAttentionParams::kernel.
enum class Tier { kHopper, kPortable, kPortableSmall };

/// Checks what the CUDA kernels support.
void check_support(const char* op, const SegmentAttentionParams& p) {
    const Checker check(op);
    check.that(p.q.dtype == DType::kBFloat16 || p.q.dtype == DType::kFloat16, "q",
               "bfloat16 or float16 on a GPU", p.q, ErrorKind::kUnsupported);
    const auto head_size = [&](const char* argument, int64_t size) {
        check.that(size % kVectorElements == 0 && size >= kVectorElements && size <= kMaxHeadDim,
                   argument, "a head size that is a multiple of 8 from 8 to 256 on a GPU", size,
                   ErrorKind::kUnsupported);
    };
    head_size("q", p.q.size(2));
    head_size("v", p.v.size(2));
    check.that(p.kernel == "auto" || p.kernel == "hopper" || p.kernel == "portable" ||
                   p.kernel == "portable-small",
               "kernel", "one of 'auto', 'hopper', 'portable', 'portable-small' on a GPU",
               [&] { return quoted(p.kernel); });
}

/// Picks the tier. `large_bytes`: shared memory of the large tiles of the portable tier.
Tier choose_tier(const char* op, const SegmentAttentionParams& p, int large_bytes) {
    if (p.kernel == "auto") {
        if (cuda::supports_hopper_kernels(op)) return Tier::kHopper;
        const bool small = cuda::current_gpu(op).block_shared_bytes < large_bytes;
        return small ? Tier::kPortableSmall : Tier::kPortable;
    }
    if (p.kernel == "portable") return Tier::kPortable;
    if (p.kernel == "portable-small") return Tier::kPortableSmall;
    const Checker check(op);
    check.that(
        cuda::supports_hopper_kernels(op), "kernel",
        "'auto', 'portable' or 'portable-small' here: 'hopper' needs a GPU of compute "
        "capability 9.0 and a build for it",
        [&] { return quoted(p.kernel); }, ErrorKind::kUnsupported);
    return Tier::kHopper;
}

/// Calls `body(Element{}, head size of the kernel's keys, and of its values)`.
template <typename Body>
auto dispatch(const SegmentAttentionParams& p, Body&& body) {
    const int64_t keys = p.q.size(2), values = p.v.size(2);
    return cuda::dispatch_half(p.q.dtype, [&]<typename Element>(Element element) {
        using cuda::Int;
        if (keys <= 64 && values <= 64) return body(element, Int<64>{}, Int<64>{});
        if (keys <= 128 && values <= 128) return body(element, Int<128>{}, Int<128>{});
        if (keys <= 192 && values <= 128) return body(element, Int<192>{}, Int<128>{});
        return body(element, Int<256>{}, Int<256>{});
    });
}

/// The head size of the Hopper kernels of keys and values with a softcap.
template <int kHeadDim>
inline constexpr int kCappedSize = kHeadDim <= 128 ? 128 : 256;

/// The head size of the portable kernels that run: kHeadDim, or a larger one where that size has no
/// kernels for these scores or for values of another size.
template <int kHeadDim>
int portable_size(const SegmentAttentionParams& p) {
    const bool fits = !portable::kOneSize<kHeadDim> || p.q.size(2) == p.v.size(2);
    if (p.softcap > 0) return fits && kHeadDim <= 128 ? 128 : 256;
    return fits ? kHeadDim : 192;
}

/// Calls `body(pass of the tier, the arguments after the parameters that it takes)`.
template <typename Body>
auto with_forward(const SegmentAttentionParams& params, Body&& body) {
    check_support(kForward, params);
    return dispatch(params, [&]<typename Element, int kKeys, int kValues>(Element, cuda::Int<kKeys>,
                                                                          cuda::Int<kValues>) {
        const bool capped = params.softcap > 0;
        const int size = portable_size<kKeys>(params);
        [[maybe_unused]] const Tier tier =
            choose_tier(kForward, params, portable::large_shared_bytes(size));
#ifdef LEMO_WITH_HOPPER
        if (tier == Tier::kHopper) {
            if (capped) {
                constexpr int kSize = kCappedSize<kKeys>;
                return body(hopper::ForwardPass<Element, kSize, kSize, true>{});
            }
            return body(hopper::ForwardPass<Element, kKeys, kValues, false>{});
        }
#endif
        if (capped) {
            if (size == 128) return body(portable::ForwardPass<Element, 128, 128, true>{});
            return body(portable::ForwardPass<Element, 256, 256, true>{});
        }
        if (size == kKeys) return body(portable::ForwardPass<Element, kKeys, kValues, false>{});
        return body(portable::ForwardPass<Element, 192, 128, false>{});
    });
}

template <typename Body>
auto with_backward(const SegmentAttentionBackwardParams& params, Body&& body) {
    check_support(kBackward, params.forward);
    return dispatch(params.forward, [&]<typename Element, int kKeys, int kValues>(
                                        Element, cuda::Int<kKeys>, cuda::Int<kValues>) {
        const bool capped = params.forward.softcap > 0;
        int size = portable_size<kKeys>(params.forward);
        const Tier tier =
            choose_tier(kBackward, params.forward, portable::large_shared_bytes(size));
#ifdef LEMO_WITH_HOPPER
        if (tier == Tier::kHopper) {
            if (capped) {
                constexpr int kSize = kCappedSize<kKeys>;
                return body(hopper::BackwardPass<Element, kSize, kSize, true>{});
            }
            return body(hopper::BackwardPass<Element, kKeys, kValues, false>{});
        }
#endif
        const bool small = tier == Tier::kPortableSmall;
        if (small && !portable::has_small_tiles(size, capped)) size = 256;
        if (capped) {
            if (size == 128) return body(portable::BackwardPass<Element, 128, 128, true>{}, small);
            return body(portable::BackwardPass<Element, 256, 256, true>{}, small);
        }
        if (size == kKeys) {
            return body(portable::BackwardPass<Element, kKeys, kValues, false>{}, small);
        }
        if (size == 192) return body(portable::BackwardPass<Element, 192, 128, false>{}, small);
        return body(portable::BackwardPass<Element, 256, 256, false>{}, small);
    });
}

}  // namespace

int64_t segment_attention_scratch_bytes(const SegmentAttentionParams& params) {
    return with_forward(params, [&](auto pass) { return pass.scratch_bytes(params); });
}

int64_t segment_attention_scratch_bytes(const SegmentAttentionBackwardParams& params) {
    return with_backward(
        params, [&](auto pass, auto... small) { return pass.scratch_bytes(params, small...); });
}

void segment_attention_cuda(const SegmentAttentionParams& params, void* cuda_stream) {
    const auto stream = static_cast<cudaStream_t>(cuda_stream);
    with_forward(params, [&](auto pass) {
        if (params.q.size(0) > 0) pass.launch(params, stream);
    });
}

void segment_attention_backward_cuda(const SegmentAttentionBackwardParams& params,
                                     void* cuda_stream) {
    const auto stream = static_cast<cudaStream_t>(cuda_stream);
    with_backward(params, [&](auto pass, auto... small) {
        if (params.forward.cu_q.size(0) < 2) {  // no sequences, no rows
            cuda::segment_attention::sum_sink_terms(params, nullptr, stream);
            return;
        }
        pass.launch(params, small..., stream);
    });
}

}  // namespace lemo
