#include "lemo/token_select.h"

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

using Selected = std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor>;

Selected token_select(TorchTensor scores, TorchTensor block_starts, TorchTensor cu_blocks,
                      std::string_view policy, double value, int64_t keep_first,
                      int64_t keep_last) {
    const TorchTensor block_scores = to_contiguous(scores);
    const TorchTensor starts = to_contiguous(block_starts), cuts = to_contiguous(cu_blocks);
    TorchTensor chosen = make_empty(scores, {scores.numel()}, ScalarType::Int);
    TorchTensor cu_rows = make_empty(scores, {cuts.numel()}, ScalarType::Int);
    TorchTensor counts = make_empty(scores, {2}, ScalarType::Long);
    run("token_select", scores,
        TokenSelectParams{view(block_scores), view(starts), view(cuts), policy, value, keep_first,
                          keep_last, view(chosen), view(cu_rows), view(counts)},
        token_select_cpu, nullptr);

    // The one read-back of the counts to the host: they are the sizes of what follows.
    const TorchTensor on_host = torch::stable::to(
        counts, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    const auto* count = static_cast<const int64_t*>(on_host.data_ptr());
    const int64_t num_blocks = count[0], num_rows = count[1];

    TorchTensor kept_blocks = torch::stable::clone(torch::stable::narrow(chosen, 0, 0, num_blocks));
    TorchTensor rows = make_empty(scores, {num_rows}, ScalarType::Int);
    TorchTensor positions = make_empty(scores, {num_rows}, ScalarType::Int);
    run("token_select", scores,
        TokenRowsParams{view(starts), view(cuts), view(kept_blocks), view(rows), view(positions)},
        token_rows_cpu, nullptr);
    return {rows, positions, cu_rows, kept_blocks};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def(
        "token_select(Tensor scores, Tensor block_starts, Tensor cu_blocks, str policy, "
        "float value, int keep_first, int keep_last) -> (Tensor, Tensor, Tensor, Tensor)");
}

#define LEMO_REGISTER(key) \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) { m.impl("token_select", TORCH_BOX(&token_select)); }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
