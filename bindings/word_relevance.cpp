#include "lemo/word_relevance.h"

#include "lemo/blocks.h"
#include "torch_tensor.h"

namespace lemo::torch_api {
namespace {

TorchTensor word_relevance(TorchTensor ids, TorchTensor firsts, TorchTensor ends,
                           int64_t block_size) {
    const TorchTensor tokens = to_contiguous(ids);
    const TorchTensor starts = to_contiguous(firsts), stops = to_contiguous(ends);
    const Checker check("word_relevance");
    check.typed("ids", view(tokens), DType::kInt64, 1);
    check.typed("firsts", view(starts), DType::kInt64, 1);
    check.block_size(block_size);
    TorchTensor relevance = make_empty(
        tokens, {starts.numel(), num_blocks(tokens.numel(), block_size)}, ScalarType::Float);
    run("word_relevance", tokens,
        WordRelevanceParams{view(tokens), view(starts), view(stops), block_size, view(relevance)},
        word_relevance_cpu, nullptr);
    return relevance;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lemo, m) {
    m.def("word_relevance(Tensor ids, Tensor firsts, Tensor ends, int block_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lemo, CPU, m) { m.impl("word_relevance", TORCH_BOX(&word_relevance)); }

}  // namespace lemo::torch_api
