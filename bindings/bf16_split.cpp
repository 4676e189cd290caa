#include "lemo/bf16_split.h"

#include <vector>

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

TorchTensor bf16_split_all(std::vector<TorchTensor> xs, std::vector<int64_t> rows) {
    const Checker check("bf16_split_all");
    check.that(
        xs.size() == rows.size(), "rows",
        [&] { return "a number for each of the " + std::to_string(xs.size()) + " matrices"; },
        rows.size());
    int64_t elements = 0;
    Bf16SplitAllParams params;
    for (size_t i = 0; i < xs.size(); ++i) {
        xs[i] = to_contiguous(xs[i]);
        Tensor x = view(xs[i]);
        const int64_t count = x.num_elements();
        const bool fits = rows[i] > 0 && count % rows[i] == 0;
        check.that(
            fits, "rows", [&] { return "a divisor of the elements of " + describe(x); }, rows[i]);
        x.ndim = 2;
        x.shape = {rows[i], count / rows[i]};
        x.stride = {x.size(1), 1};
        params.xs.push_back(x);
        elements += count;
    }
    TorchTensor y = make_empty(xs[0], {3 * elements}, ScalarType::BFloat16);
    params.y = view(y);
    run("bf16_split_all", y, params, bf16_split_all_cpu, LEMO_CUDA_KERNEL(bf16_split_all_cuda));
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def("bf16_split(Tensor x, float scale, bool left) -> Tensor");
    m.def("bf16_split_all(Tensor[] xs, int[] rows) -> Tensor");
}

#define LEMO_REGISTER(key)                                    \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {                 \
        m.impl("bf16_split", TORCH_BOX(&bf16_split));         \
        m.impl("bf16_split_all", TORCH_BOX(&bf16_split_all)); \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
