#include "lemo/rope.h"

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

TorchTensor rope(TorchTensor x, TorchTensor cos, TorchTensor sin, OptionalTensor rows,
                 bool transposed) {
    const TorchTensor heads = to_contiguous(x);
    const TorchTensor cosines = to_contiguous(cos), sines = to_contiguous(sin);
    const OptionalTensor row_index = to_contiguous(rows);
    const Tensor view_x = view(heads);
    if (view_x.ndim != 3) Checker("rope").floating("x", view_x, 3);
    TorchTensor y = make_empty(heads, {view_x.size(0), view_x.size(1), view_x.size(2)});
    run("rope", heads,
        RopeParams{view_x, view(cosines), view(sines), view(row_index), transposed, view(y)},
        rope_cpu, LEMO_CUDA_KERNEL(rope_cuda));
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor? rows, bool transposed) -> Tensor");
}

#define LEMO_REGISTER(key) \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) { m.impl("rope", TORCH_BOX(&rope)); }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
