#include "lemo/block_attention.h"

#include <algorithm>

#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

std::tuple<TorchTensor, TorchTensor> block_attention(TorchTensor q, TorchTensor k, TorchTensor rows,
                                                     TorchTensor block_starts,
                                                     TorchTensor cu_blocks, double scale) {
    const TorchTensor queries = to_aligned(q), keys = to_aligned(k), index = to_contiguous(rows);
    const TorchTensor starts = to_contiguous(block_starts), cuts = to_contiguous(cu_blocks);
    // The results take their shape from it, so its dimensions are checked before they are read.
    Checker("block_attention").floating("q", view(queries), 3);
    const int64_t num_rows = queries.size(0), heads = queries.size(1);
    const int64_t num_blocks = std::max<int64_t>(view(starts).num_elements() - 1, 0);
    TorchTensor maximum = make_empty(queries, {num_rows, heads, num_blocks}, ScalarType::Float);
    TorchTensor logsumexp = make_empty(queries, {num_rows, heads, num_blocks}, ScalarType::Float);
    run("block_attention", queries,
        BlockAttentionParams{view(queries), view(keys), view(index), view(starts), view(cuts),
                             scale, view(maximum), view(logsumexp)},
        block_attention_cpu, LEMO_CUDA_KERNEL(block_attention_cuda));
    return {maximum, logsumexp};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def(
        "block_attention(Tensor q, Tensor k, Tensor rows, Tensor block_starts, Tensor cu_blocks, "
        "float scale) -> (Tensor, Tensor)");
}

#define LEMO_REGISTER(key)                                      \
    STABLE_TORCH_LIBRARY_IMPL(lemo, key, m) {                   \
        m.impl("block_attention", TORCH_BOX(&block_attention)); \
    }
LEMO_REGISTER(CPU)
LEMO_REGISTER(CUDA)
#undef LEMO_REGISTER

}  // namespace lemo::torch_api
