#include "lemo/bf16_split.h"

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

TorchTensor bf16_split(TorchTensor x, double scale, bool left) {
    const TorchTensor values = to_contiguous(x);
    const Tensor view_values = view(values);
    const Checker check("bf16_split");
    if (view_values.ndim != 3) check.typed("x", view_values, DType::kFloat32, 2);
    const int64_t columns = view_values.size(view_values.ndim - 1);
    TorchTensor y = make_empty(values, {view_values.size(0), 3, columns}, ScalarType::BFloat16);
    run("bf16_split", values,
        Bf16SplitParams{view_values, view(y), static_cast<float>(scale), left}, bf16_split_cpu,
        LEMO_CUDA_KERNEL(bf16_split_cuda));
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def("bf16_split(Tensor x, float scale, bool left) -> Tensor");
}

#define LEMO_REGISTER(key) \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) { m.impl("bf16_split", TORCH_BOX(&bf16_split)); }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
