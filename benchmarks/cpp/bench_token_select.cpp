#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "lemo/token_select.h"

namespace {

template <typename T>
lemo::Tensor vector_view(std::vector<T>& values, lemo::DType dtype) {
    const int64_t size = static_cast<int64_t>(values.size());
    return {values.data(), dtype, lemo::Device::kCpu, 1, {size}, {1}};
}

lemo::Tensor pairs_view(std::vector<int32_t>& values) {
    const int64_t size = static_cast<int64_t>(values.size() / 2);
    return {values.data(), lemo::DType::kInt32, lemo::Device::kCpu, 2, {size, 2}, {2, 1}};
}

// One sequence of `tokens` in blocks of 64, half of them kept.
void BM_TokenSelect(benchmark::State& state) {
    const size_t tokens = static_cast<size_t>(state.range(0)), blocks = tokens / 64;
    std::mt19937 generator(0);
    std::uniform_real_distribution<float> uniform;
    std::vector<float> scores(blocks);
    for (float& score : scores) score = uniform(generator);
    std::vector<int32_t> starts(blocks + 1), cuts{0, static_cast<int32_t>(blocks)};
    for (size_t b = 0; b <= blocks; ++b) starts[b] = static_cast<int32_t>(b * 64);
    std::vector<int32_t> places(2 * blocks), cu_kept(2), cu_rows(2), kept(blocks / 2);
    std::vector<int32_t> rows(tokens / 2), positions(tokens / 2);
    std::vector<int64_t> counts(2);
    const auto int32 = lemo::DType::kInt32;
    const lemo::TokenSelectParams select{vector_view(scores, lemo::DType::kFloat32),
                                         vector_view(starts, int32),
                                         vector_view(cuts, int32),
                                         "ratio",
                                         0.5,
                                         1,
                                         1,
                                         pairs_view(places),
                                         vector_view(cu_kept, int32),
                                         vector_view(cu_rows, int32),
                                         vector_view(counts, lemo::DType::kInt64)};
    for (auto _ : state) {
        lemo::token_select_cpu(select);
        lemo::token_rows_cpu({select.block_starts, select.cu_blocks, select.places, select.cu_kept,
                              select.cu_rows, vector_view(kept, int32), vector_view(rows, int32),
                              vector_view(positions, int32)});
    }
    state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(BM_TokenSelect)->Arg(8192)->Arg(131072);

}  // namespace
