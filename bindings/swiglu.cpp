#include "lemo/swiglu.h"

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

TorchTensor swiglu(TorchTensor gate, TorchTensor up) {
    const TorchTensor gates = to_contiguous(gate), ups = to_contiguous(up);
    const Tensor view_gate = view(gates);
    if (view_gate.ndim != 2) Checker("swiglu").floating("gate", view_gate, 2);
    TorchTensor y = make_empty(gates, {view_gate.size(0), view_gate.size(1)});
    run("swiglu", gates, SwigluParams{view_gate, view(ups), view(y)}, swiglu_cpu,
        LEMO_CUDA_KERNEL(swiglu_cuda));
    return y;
}

void swiglu_backward(TorchTensor dout, TorchTensor gate, TorchTensor up) {
    const TorchTensor gradient = to_contiguous(dout);
    run("swiglu_backward", gate, SwigluBackwardParams{view(gradient), view(gate), view(up)},
        swiglu_backward_cpu, LEMO_CUDA_KERNEL(swiglu_backward_cuda));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
    m.def("swiglu_backward(Tensor dout, Tensor(a!) gate, Tensor(b!) up) -> ()");
}

#define LEMO_REGISTER(key)                                      \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {                   \
        m.impl("swiglu", TORCH_BOX(&swiglu));                   \
        m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward)); \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
