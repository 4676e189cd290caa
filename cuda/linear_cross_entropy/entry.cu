// linear_cross_entropy on CUDA: what is supported. One tier, for every GPU of compute
// capability 8.0 and newer: its matrix products are cuBLAS's.
#include "lemo/linear_cross_entropy.h"

#include <string>

#include "lemo/check.h"
#include "linear_cross_entropy/portable/driver.h"

namespace lemo {
namespace {

namespace portable = cuda::linear_cross_entropy::portable;

void require_supported(const LinearCrossEntropyParams& p) {
    const Checker check("linear_cross_entropy");
    const auto dtype_of_hidden = [&] {
        return std::string("the dtype of 'hidden' (") + name(p.hidden.dtype) +
               ") on cuda, where the product is cuBLAS's";
    };
    check.that(p.hidden.dtype == p.weight.dtype, "weight", dtype_of_hidden, name(p.weight.dtype),
               ErrorKind::kUnsupported);
    check.that(p.weight.size(0) <= 1 << 30, "weight", "a vocabulary of at most 2^30 on cuda",
               p.weight.size(0), ErrorKind::kUnsupported);
}

}  // namespace

int64_t linear_cross_entropy_scratch_bytes(const LinearCrossEntropyParams& params) {
    require_supported(params);
    return portable::scratch_bytes(params);
}

void linear_cross_entropy_cuda(const LinearCrossEntropyParams& params, void* stream) {
    require_supported(params);
    portable::launch(params, static_cast<cudaStream_t>(stream));
}

}  // namespace lemo
