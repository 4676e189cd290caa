#include "lemo/select_norm.h"

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

/// [R, H]: checked before results of that size are allocated.
std::pair<int64_t, int64_t> packed_shape(const char* op, const char* argument,
                                         const Tensor& residual, const Tensor& rows) {
    Checker(op).floating(argument, residual, 2);
    return {rows ? rows.num_elements() : residual.size(0), residual.size(1)};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor> select_norm(
    TorchTensor x, OptionalTensor rows, TorchTensor weight, OptionalTensor bias, double eps,
    std::string_view kind, bool save_rows) {
    const TorchTensor residual = to_contiguous(x), scale = to_contiguous(weight);
    const OptionalTensor row_index = to_contiguous(rows), shift = to_contiguous(bias);
    const auto [num_rows, hidden] =
        packed_shape("select_norm", "x", view(residual), view(row_index));
    TorchTensor y = make_empty(residual, {num_rows, hidden});
    TorchTensor x_rows = make_empty(residual, {save_rows ? num_rows : 0, hidden});
    TorchTensor mean = make_empty(residual, {kind == "layer" ? num_rows : 0}, ScalarType::Float);
    TorchTensor rstd = make_empty(residual, {num_rows}, ScalarType::Float);
    run("select_norm", residual,
        SelectNormParams{view(residual), view(row_index), view(scale), view(shift), eps, kind,
                         view(y), save_rows ? view(x_rows) : Tensor{}, view(mean), view(rstd)},
        select_norm_cpu, LEMO_CUDA_KERNEL(select_norm_cuda));
    return {y, x_rows, mean, rstd};
}

std::tuple<TorchTensor, TorchTensor> select_norm_backward(TorchTensor dy, TorchTensor x_rows,
                                                          OptionalTensor rows, TorchTensor weight,
                                                          TorchTensor mean, TorchTensor rstd,
                                                          std::string_view kind, TorchTensor dx,
                                                          bool weight_grad) {
    const TorchTensor packed = to_contiguous(dy), saved = to_contiguous(x_rows);
    const TorchTensor scale = to_contiguous(weight);
    const OptionalTensor row_index = to_contiguous(rows);
    const int64_t hidden =
        packed_shape("select_norm_backward", "dx", view(dx), view(row_index)).second;
    const bool bias_grad = weight_grad && kind == "layer";
    TorchTensor dweight = make_empty(dx, {weight_grad ? hidden : 0}, ScalarType::Float);
    TorchTensor dbias = make_empty(dx, {bias_grad ? hidden : 0}, ScalarType::Float);
    run("select_norm_backward", dx,
        SelectNormBackwardParams{
            view(packed), view(saved), view(row_index), view(scale), view(mean), view(rstd), kind,
            view(dx), weight_grad ? view(dweight) : Tensor{}, bias_grad ? view(dbias) : Tensor{}},
        select_norm_backward_cpu, LEMO_CUDA_KERNEL(select_norm_backward_cuda));
    return {dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def(
        "select_norm(Tensor x, Tensor? rows, Tensor weight, Tensor? bias, float eps, str kind, "
        "bool save_rows) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "select_norm_backward(Tensor dy, Tensor x_rows, Tensor? rows, Tensor weight, Tensor mean, "
        "Tensor rstd, str kind, Tensor(a!) dx, bool weight_grad) -> (Tensor, Tensor)");
}

#define LEMO_REGISTER(key)                                                \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {                             \
        m.impl("select_norm", TORCH_BOX(&select_norm));                   \
        m.impl("select_norm_backward", TORCH_BOX(&select_norm_backward)); \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
