#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <vector>

#include "lemo/word_relevance.h"

namespace {

template <typename T>
lemo::Tensor vector_view(std::vector<T>& values, lemo::DType dtype) {
    const int64_t size = static_cast<int64_t>(values.size());
    return {values.data(), dtype, lemo::Device::kCpu, 1, {size}, {1}};
}

// A prompt of `tokens` with 6 answers of 8 tokens at its end, in blocks of 64. A few words are
// frequent, most are rare.
void BM_WordRelevance(benchmark::State& state) {
    const int64_t tokens = state.range(0), blocks = tokens / 64;
    std::mt19937 generator(0);
    std::uniform_real_distribution<double> uniform;
    std::vector<int64_t> ids(static_cast<size_t>(tokens)), firsts, ends;
    for (int64_t& id : ids) id = static_cast<int64_t>(20000 * std::pow(uniform(generator), 4));
    for (int64_t first = tokens - 192; first < tokens; first += 32) {
        firsts.push_back(first);
        ends.push_back(first + 8);
    }
    std::vector<float> relevance(static_cast<size_t>(blocks) * firsts.size());
    const auto answers = static_cast<int64_t>(firsts.size());
    const lemo::WordRelevanceParams params{vector_view(ids, lemo::DType::kInt64),
                                           vector_view(firsts, lemo::DType::kInt64),
                                           vector_view(ends, lemo::DType::kInt64),
                                           64,
                                           {relevance.data(),
                                            lemo::DType::kFloat32,
                                            lemo::Device::kCpu,
                                            2,
                                            {answers, blocks},
                                            {blocks, 1}}};
    for (auto _ : state) lemo::word_relevance_cpu(params);
    state.SetItemsProcessed(state.iterations() * tokens);
}
BENCHMARK(BM_WordRelevance)->Arg(16384)->Arg(131072);

}  // namespace
