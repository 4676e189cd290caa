#include "lemo/block_scores.h"

#include <algorithm>

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

TorchTensor block_scores(TorchTensor q, TorchTensor k, TorchTensor block_starts,
                         TorchTensor cu_blocks, double scale, std::string_view kernel) {
    const TorchTensor queries = to_aligned(q), keys = to_aligned(k);
    const TorchTensor starts = to_contiguous(block_starts), cuts = to_contiguous(cu_blocks);
    const int64_t num_blocks = std::max<int64_t>(view(starts).num_elements() - 1, 0);
    TorchTensor scores = make_empty(queries, {num_blocks}, ScalarType::Float);
    BlockScoresParams params{view(queries), view(keys),   view(starts), view(cuts),
                             scale,         view(scores), nullptr,      kernel};
    const OptionalTensor scratch =
        make_scratch(queries, params, LEMO_CUDA_KERNEL(block_scores_scratch_bytes));
    run("block_scores", queries, params, block_scores_cpu, LEMO_CUDA_KERNEL(block_scores_cuda));
    return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def(
        "block_scores(Tensor q, Tensor k, Tensor block_starts, Tensor cu_blocks, float scale, "
        "str kernel_name=\"auto\") -> Tensor");
}

#define LEMO_REGISTER(key) \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) { m.impl("block_scores", TORCH_BOX(&block_scores)); }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
