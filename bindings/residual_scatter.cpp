#include "lemo/residual_scatter.h"

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

void residual_scatter(TorchTensor x, TorchTensor y, OptionalTensor rows) {
    const TorchTensor packed = to_contiguous(y);
    const OptionalTensor row_index = to_contiguous(rows);
    run("residual_scatter", x, ResidualScatterParams{view(x), view(packed), view(row_index)},
        residual_scatter_cpu, LEMO_CUDA_KERNEL(residual_scatter_cuda));
}

TorchTensor gather_rows(TorchTensor x, OptionalTensor rows) {
    const TorchTensor residual = to_contiguous(x);
    const OptionalTensor row_index = to_contiguous(rows);
    const Tensor from = view(residual);
    if (from.ndim != 2) {
        Checker("gather_rows").floating("x", from, 2);
    }
    const int64_t num_rows = rows ? view(row_index).num_elements() : from.size(0);
    TorchTensor y = make_empty(residual, {num_rows, from.size(1)});
    run("gather_rows", residual, GatherRowsParams{from, view(row_index), view(y)}, gather_rows_cpu,
        LEMO_CUDA_KERNEL(gather_rows_cuda));
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def("residual_scatter(Tensor(a!) x, Tensor y, Tensor? rows) -> ()");
    m.def("gather_rows(Tensor x, Tensor? rows) -> Tensor");
}

#define LEMO_REGISTER(key)                                        \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {                     \
        m.impl("residual_scatter", TORCH_BOX(&residual_scatter)); \
        m.impl("gather_rows", TORCH_BOX(&gather_rows));           \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
