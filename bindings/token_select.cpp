#include "lemo/token_select.h"

#include <limits>

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

using Selected = std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor>;

struct Sizes {
    int64_t blocks, rows;
};

/// The one read-back of the op: the host waits for the counts, which size what follows. Only where
/// the caller does not know them.
Sizes read_back(const TorchTensor& counts) {
    const TorchTensor on_host = copy_to_host(counts);
    const auto* count = static_cast<const int64_t*>(on_host.data_ptr());
    return {count[0], count[1]};
}

Selected token_select(TorchTensor scores, TorchTensor block_starts, TorchTensor cu_blocks,
                      std::string_view policy, double value, int64_t keep_first, int64_t keep_last,
                      int64_t num_kept_blocks, int64_t num_kept_rows) {
    const Checker check("token_select");
    const TorchTensor block_scores = to_contiguous(scores);
    const TorchTensor starts = to_contiguous(block_starts), cuts = to_contiguous(cu_blocks);
    check.typed("scores", view(block_scores), DType::kFloat32, 1);
    check.dim("scores", view(block_scores), 0, starts.numel() - 1,
              "the number of blocks of the layout");
    const int64_t num_blocks = scores.numel();
    TorchTensor places = make_empty(scores, {num_blocks, 2}, ScalarType::Int);
    TorchTensor cu_kept = make_empty(scores, {cuts.numel()}, ScalarType::Int);
    TorchTensor cu_rows = make_empty(scores, {cuts.numel()}, ScalarType::Int);
    TorchTensor counts = make_empty(scores, {2}, ScalarType::Long);
    run("token_select", scores,
        TokenSelectParams{view(block_scores), view(starts), view(cuts), policy, value, keep_first,
                          keep_last, view(places), view(cu_kept), view(cu_rows), view(counts)},
        token_select_cpu, LEMO_CUDA_KERNEL(token_select_cuda));

    const auto at_most = [](int64_t most) { return "at most " + std::to_string(most) + ", or -1"; };
    check.that(
        num_kept_blocks >= -1 && num_kept_blocks <= num_blocks, "num_kept_blocks",
        [&] { return at_most(num_blocks); }, num_kept_blocks);
    // On a GPU only the device knows the rows of the layout; an index of them is an int32.
    const Tensor ends = view(starts);
    const int64_t num_rows = ends.device == Device::kCpu ? ends.as<const int32_t>()[num_blocks]
                                                         : std::numeric_limits<int32_t>::max();
    check.that(num_kept_rows >= -1, "num_kept_rows", "at least 0, or -1", num_kept_rows);
    check.that(
        num_kept_rows <= num_rows, "num_kept_rows", [&] { return at_most(num_rows); },
        num_kept_rows);
    const bool known = num_kept_blocks >= 0 && num_kept_rows >= 0;
    const Sizes sizes = known ? Sizes{num_kept_blocks, num_kept_rows} : read_back(counts);
    TorchTensor kept_blocks = make_empty(scores, {sizes.blocks}, ScalarType::Int);
    TorchTensor rows = make_empty(scores, {sizes.rows}, ScalarType::Int);
    TorchTensor positions = make_empty(scores, {sizes.rows}, ScalarType::Int);
    run("token_select", scores,
        TokenRowsParams{view(starts), view(cuts), view(places), view(cu_kept), view(cu_rows),
                        view(kept_blocks), view(rows), view(positions)},
        token_rows_cpu, LEMO_CUDA_KERNEL(token_rows_cuda));
    return {rows, positions, cu_rows, kept_blocks};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def(
        "token_select(Tensor scores, Tensor block_starts, Tensor cu_blocks, str policy, "
        "float value, int keep_first, int keep_last, int num_kept_blocks, int num_kept_rows) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
}

#define LEMO_REGISTER(key) \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) { m.impl("token_select", TORCH_BOX(&token_select)); }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
