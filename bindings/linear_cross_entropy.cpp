#include "lemo/linear_cross_entropy.h"

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

using Results = std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor>;

Results linear_cross_entropy(TorchTensor hidden, TorchTensor weight, OptionalTensor bias,
                             TorchTensor labels, int64_t ignore_index, int64_t chunk_rows,
                             bool hidden_grad, bool weight_grad) {
    const TorchTensor rows = to_contiguous(hidden), matrix = to_contiguous(weight);
    const TorchTensor targets = to_contiguous(labels);
    const OptionalTensor offsets = to_contiguous(bias);
    // Results take their shapes from the arguments, so dimensions are checked before they are read.
    const Checker check("linear_cross_entropy");
    check.floating("hidden", view(rows), 2);
    check.floating("weight", view(matrix), 2);
    if (offsets) check.floating("bias", view(offsets), 1);

    TorchTensor loss = make_empty(rows, {}, ScalarType::Float);
    TorchTensor count = make_empty(rows, {}, ScalarType::Long);
    TorchTensor dhidden =
        hidden_grad ? make_empty(rows, {rows.size(0), rows.size(1)}) : make_empty(rows, {0});
    const bool bias_grad = weight_grad && offsets;
    TorchTensor dweight = weight_grad ? make_empty(matrix, {matrix.size(0), matrix.size(1)})
                                      : make_empty(matrix, {0});
    TorchTensor dbias =
        bias_grad ? make_empty(*offsets, {offsets->size(0)}) : make_empty(matrix, {0});
    LinearCrossEntropyParams params{view(rows),
                                    view(matrix),
                                    view(offsets),
                                    view(targets),
                                    ignore_index,
                                    chunk_rows,
                                    view(loss),
                                    view(count),
                                    hidden_grad ? view(dhidden) : Tensor{},
                                    weight_grad ? view(dweight) : Tensor{},
                                    bias_grad ? view(dbias) : Tensor{}};
    const OptionalTensor scratch =
        make_scratch(rows, params, LEMO_CUDA_KERNEL(linear_cross_entropy_scratch_bytes));
    run("linear_cross_entropy", rows, params, linear_cross_entropy_cpu,
        LEMO_CUDA_KERNEL(linear_cross_entropy_cuda));
    return {loss, count, dhidden, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def(
        "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
        "int ignore_index, int chunk_rows, bool hidden_grad, bool weight_grad) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#define LEMO_REGISTER(key)                                                \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {                             \
        m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy)); \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
