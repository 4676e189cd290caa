#include "lemo/predictor.h"

#include <algorithm>

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

/// The arguments that both directions share, contiguous and kept alive.
struct Arguments {
    TorchTensor x, k_down, k_mid, k_up;
    OptionalTensor q_down, q_mid, q_up;
    TorchTensor block_starts, cu_blocks;

    Arguments(const TorchTensor& x, const TorchTensor& k_down, const TorchTensor& k_mid,
              const TorchTensor& k_up, const OptionalTensor& q_down, const OptionalTensor& q_mid,
              const OptionalTensor& q_up, const TorchTensor& block_starts,
              const TorchTensor& cu_blocks)
        : x(to_aligned(x)), k_down(to_aligned(k_down)), k_mid(to_contiguous(k_mid)),
          k_up(to_contiguous(k_up)),
          q_down(q_down ? OptionalTensor(to_aligned(*q_down)) : std::nullopt),
          q_mid(to_contiguous(q_mid)), q_up(to_contiguous(q_up)),
          block_starts(to_contiguous(block_starts)), cu_blocks(to_contiguous(cu_blocks)) {}

    PredictorParams params(const Tensor& scores) const {
        return {view(x),
                {view(k_down), view(k_mid), view(k_up)},
                {view(q_down), view(q_mid), view(q_up)},
                view(block_starts),
                view(cu_blocks),
                scores};
    }
};

TorchTensor predictor(TorchTensor x, TorchTensor k_down, TorchTensor k_mid, TorchTensor k_up,
                      OptionalTensor q_down, OptionalTensor q_mid, OptionalTensor q_up,
                      TorchTensor block_starts, TorchTensor cu_blocks) {
    const Arguments arguments(x, k_down, k_mid, k_up, q_down, q_mid, q_up, block_starts, cu_blocks);
    const int64_t num_blocks = std::max<int64_t>(view(block_starts).num_elements() - 1, 0);
    TorchTensor scores = make_empty(x, {num_blocks}, ScalarType::Float);
    PredictorParams params = arguments.params(view(scores));
    const OptionalTensor scratch =
        make_scratch(x, params, LEMO_CUDA_KERNEL(predictor_scratch_bytes));
    run("predictor", x, params, predictor_cpu, LEMO_CUDA_KERNEL(predictor_cuda));
    return scores;
}

/// An uninitialised fp32 tensor of the shape of `weight`.
TorchTensor gradient_of(const char* argument, const TorchTensor& weight) {
    const Tensor shape = view(weight);
    Checker("predictor_backward").floating(argument, shape, 2);
    return make_empty(weight, {shape.size(0), shape.size(1)}, ScalarType::Float);
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor, TorchTensor>
predictor_backward(TorchTensor dscores, TorchTensor x, TorchTensor k_down, TorchTensor k_mid,
                   TorchTensor k_up, OptionalTensor q_down, OptionalTensor q_mid,
                   OptionalTensor q_up, TorchTensor block_starts, TorchTensor cu_blocks) {
    const Arguments arguments(x, k_down, k_mid, k_up, q_down, q_mid, q_up, block_starts, cu_blocks);
    const TorchTensor dscore = to_contiguous(dscores);
    const auto gradient = [&](const char* argument, const OptionalTensor& weight) {
        return weight ? gradient_of(argument, *weight) : make_empty(x, {0}, ScalarType::Float);
    };
    TorchTensor dk_down = gradient("k_down", arguments.k_down);
    TorchTensor dk_mid = gradient("k_mid", arguments.k_mid);
    TorchTensor dk_up = gradient("k_up", arguments.k_up);
    TorchTensor dq_down = gradient("q_down", arguments.q_down);
    TorchTensor dq_mid = gradient("q_mid", arguments.q_mid);
    TorchTensor dq_up = gradient("q_up", arguments.q_up);
    PredictorBackwardParams params{view(dscore),
                                   arguments.params(Tensor{}),
                                   {view(dk_down), view(dk_mid), view(dk_up)},
                                   {view(dq_down), view(dq_mid), view(dq_up)}};
    const OptionalTensor scratch =
        make_scratch(x, params, LEMO_CUDA_KERNEL(predictor_scratch_bytes));
    run("predictor_backward", x, params, predictor_backward_cpu,
        LEMO_CUDA_KERNEL(predictor_backward_cuda));
    return {dk_down, dk_mid, dk_up, dq_down, dq_mid, dq_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def(
        "predictor(Tensor x, Tensor k_down, Tensor k_mid, Tensor k_up, Tensor? q_down, "
        "Tensor? q_mid, Tensor? q_up, Tensor block_starts, Tensor cu_blocks) -> Tensor");
    m.def(
        "predictor_backward(Tensor dscores, Tensor x, Tensor k_down, Tensor k_mid, Tensor k_up, "
        "Tensor? q_down, Tensor? q_mid, Tensor? q_up, Tensor block_starts, Tensor cu_blocks) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#define LEMO_REGISTER(key)                                            \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {                         \
        m.impl("predictor", TORCH_BOX(&predictor));                   \
        m.impl("predictor_backward", TORCH_BOX(&predictor_backward)); \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
