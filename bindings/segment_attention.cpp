#include "lemo/segment_attention.h"

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

/// Contiguous arguments; they live as long as the views of `params`.
struct Arguments {
    Arguments(const TorchTensor& q, const TorchTensor& k, const TorchTensor& v,
              const TorchTensor& cu_q, const TorchTensor& cu_k, const OptionalTensor& q_positions,
              const OptionalTensor& k_positions, double scale, int64_t window, int64_t group_size,
              double softcap, const OptionalTensor& sinks, std::string_view kernel)
        : q(to_aligned(q)), k(to_aligned(k)), v(to_aligned(v)), cu_q(to_contiguous(cu_q)),
          cu_k(to_contiguous(cu_k)), q_positions(to_contiguous(q_positions)),
          k_positions(to_contiguous(k_positions)), sinks(to_contiguous(sinks)),
          params{view(this->q),
                 view(this->k),
                 view(this->v),
                 view(this->cu_q),
                 view(this->cu_k),
                 view(this->q_positions),
                 view(this->k_positions),
                 static_cast<float>(scale),
                 window,
                 group_size,
                 static_cast<float>(softcap),
                 view(this->sinks),
                 kernel,
                 {},
                 {},
                 {}} {}

    TorchTensor q, k, v, cu_q, cu_k;
    OptionalTensor q_positions, k_positions, sinks;
    SegmentAttentionParams params;
};

/// Results take their shapes from `tensor`, so its dimensions are checked before they are read.
void check_heads(const char* op, const char* argument, const Tensor& tensor) {
    Checker(op).floating(argument, tensor, 3);
}

TorchTensor make_like(const TorchTensor& tensor) {
    return make_empty(tensor, {tensor.size(0), tensor.size(1), tensor.size(2)});
}

std::tuple<TorchTensor, TorchTensor> segment_attention(
    TorchTensor q, TorchTensor k, TorchTensor v, TorchTensor cu_q, TorchTensor cu_k,
    OptionalTensor q_positions, OptionalTensor k_positions, double scale, int64_t window,
    int64_t group_size, double softcap, OptionalTensor sinks, std::string_view kernel) {
    Arguments arguments(q, k, v, cu_q, cu_k, q_positions, k_positions, scale, window, group_size,
                        softcap, sinks, kernel);
    check_heads("segment_attention", "q", arguments.params.q);
    check_heads("segment_attention", "v", arguments.params.v);
    TorchTensor out = make_empty(arguments.q, {q.size(0), q.size(1), v.size(2)});
    TorchTensor lse = make_empty(arguments.q, {q.size(1), q.size(0)}, ScalarType::Float);
    arguments.params.out = view(out);
    arguments.params.lse = view(lse);
    const OptionalTensor scratch = make_scratch(arguments.q, arguments.params,
                                                LEMO_CUDA_KERNEL(segment_attention_scratch_bytes));
    run("segment_attention", arguments.q, arguments.params, segment_attention_cpu,
        LEMO_CUDA_KERNEL(segment_attention_cuda));
    return {out, lse};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor> segment_attention_backward(
    TorchTensor dout, TorchTensor q, TorchTensor k, TorchTensor v, TorchTensor out, TorchTensor lse,
    TorchTensor cu_q, TorchTensor cu_k, OptionalTensor q_positions, OptionalTensor k_positions,
    double scale, int64_t window, int64_t group_size, double softcap, OptionalTensor sinks,
    bool deterministic, std::string_view kernel) {
    Arguments arguments(q, k, v, cu_q, cu_k, q_positions, k_positions, scale, window, group_size,
                        softcap, sinks, kernel);
    check_heads("segment_attention_backward", "q", arguments.params.q);
    check_heads("segment_attention_backward", "k", arguments.params.k);
    check_heads("segment_attention_backward", "v", arguments.params.v);
    const TorchTensor saved_out = to_aligned(out), saved_lse = to_contiguous(lse);
    const TorchTensor gradient = to_aligned(dout);
    TorchTensor dq = make_like(arguments.q);
    TorchTensor dk = make_like(arguments.k);
    TorchTensor dv = make_like(arguments.v);
    TorchTensor dsinks = make_empty(arguments.q, {sinks ? q.size(1) : 0}, ScalarType::Float);
    arguments.params.out = view(saved_out);
    arguments.params.lse = view(saved_lse);
    SegmentAttentionBackwardParams params{arguments.params,
                                          deterministic,
                                          view(gradient),
                                          view(dq),
                                          view(dk),
                                          view(dv),
                                          sinks ? view(dsinks) : Tensor{}};
    const OptionalTensor scratch =
        make_scratch(arguments.q, params, LEMO_CUDA_KERNEL(segment_attention_scratch_bytes));
    run("segment_attention_backward", arguments.q, params, segment_attention_backward_cpu,
        LEMO_CUDA_KERNEL(segment_attention_backward_cuda));
    return {dq, dk, dv, dsinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def(
        "segment_attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, "
        "Tensor? q_positions, Tensor? k_positions, float scale, int window, int group_size, "
        "float softcap=0.0, Tensor? sinks=None, str kernel_name=\"auto\") -> (Tensor, Tensor)");
    m.def(
        "segment_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
        "Tensor lse, Tensor cu_q, Tensor cu_k, Tensor? q_positions, Tensor? k_positions, "
        "float scale, int window, int group_size, float softcap=0.0, Tensor? sinks=None, "
        "bool deterministic=False, str kernel_name=\"auto\") -> (Tensor, Tensor, Tensor, Tensor)");
}

#define LEMO_REGISTER(key)                                                            \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {                                         \
        m.impl("segment_attention", TORCH_BOX(&segment_attention));                   \
        m.impl("segment_attention_backward", TORCH_BOX(&segment_attention_backward)); \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
