#include "lemo/fp8_rows.h"

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

uint8_t* bytes(const TorchTensor& values) { return static_cast<uint8_t*>(values.data_ptr()); }

std::tuple<TorchTensor, TorchTensor> fp8_rows(TorchTensor x, OptionalTensor columns) {
    const TorchTensor rows = to_aligned(x);
    const OptionalTensor factors = to_contiguous(columns);
    const Tensor view_rows = view(rows);
    Checker("fp8_rows").floating("x", view_rows, 2);
    TorchTensor values =
        make_empty(rows, {view_rows.size(0), view_rows.size(1)}, ScalarType::Float8_e4m3fn);
    TorchTensor scales = make_empty(rows, {view_rows.size(0), 1}, ScalarType::Float);
    run("fp8_rows", rows, Fp8RowsParams{view_rows, view(factors), view(scales), bytes(values)},
        fp8_rows_cpu, LEMO_CUDA_KERNEL(fp8_rows_cuda));
    return {values, scales};
}

TorchTensor fp8_transpose(TorchTensor x) {
    const Checker check("fp8_transpose");
    check.that(x.scalar_type() == ScalarType::Float8_e4m3fn, "x", "float8_e4m3fn", view(x),
               ErrorKind::kType);
    check.that(x.dim() == 2, "x", "2 dimension(s)", view(x));
    const TorchTensor values = to_aligned(x);
    const int64_t rows = values.size(0), columns = values.size(1);
    TorchTensor y = make_empty(values, {columns, rows});
    run("fp8_transpose", values, Fp8TransposeParams{bytes(values), bytes(y), rows, columns},
        fp8_transpose_cpu, LEMO_CUDA_KERNEL(fp8_transpose_cuda));
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def("fp8_rows(Tensor x, Tensor? columns) -> (Tensor, Tensor)");
    m.def("fp8_transpose(Tensor x) -> Tensor");
}

#define LEMO_REGISTER(key)                                  \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {               \
        m.impl("fp8_rows", TORCH_BOX(&fp8_rows));           \
        m.impl("fp8_transpose", TORCH_BOX(&fp8_transpose)); \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
