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

std::tuple<TorchTensor, TorchTensor, TorchTensor> swiglu_fp8(TorchTensor gate, TorchTensor up) {
    const TorchTensor gates = to_aligned(gate), ups = to_aligned(up);
    const Tensor view_gate = view(gates);
    Checker("swiglu_fp8").floating("gate", view_gate, 2);
    const int64_t rows = view_gate.size(0), columns = view_gate.size(1);
    TorchTensor y = make_empty(gates, {rows, columns});
    TorchTensor values = make_empty(gates, {rows, columns}, ScalarType::Float8_e4m3fn);
    TorchTensor scales = make_empty(gates, {rows, 1}, ScalarType::Float);
    run("swiglu_fp8", gates,
        SwigluFp8Params{{view_gate, view(ups), view(y)},
                        view(scales),
                        static_cast<uint8_t*>(values.data_ptr())},
        swiglu_fp8_cpu, LEMO_CUDA_KERNEL(swiglu_fp8_cuda));
    return {y, values, scales};
}

void swiglu_backward(TorchTensor dout, TorchTensor gate, TorchTensor up) {
    const TorchTensor gradient = to_contiguous(dout);
    run("swiglu_backward", gate, SwigluBackwardParams{view(gradient), view(gate), view(up)},
        swiglu_backward_cpu, LEMO_CUDA_KERNEL(swiglu_backward_cuda));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
    m.def("swiglu_fp8(Tensor gate, Tensor up) -> (Tensor, Tensor, Tensor)");
    m.def("swiglu_backward(Tensor dout, Tensor(a!) gate, Tensor(b!) up) -> ()");
}

#define LEMO_REGISTER(key)                                      \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {                   \
        m.impl("swiglu", TORCH_BOX(&swiglu));                   \
        m.impl("swiglu_fp8", TORCH_BOX(&swiglu_fp8));           \
        m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward)); \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
