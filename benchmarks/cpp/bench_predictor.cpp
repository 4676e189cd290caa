#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "lemo/predictor.h"

namespace {

// One sequence in blocks of 64; maps of hidden -> rank -> rank -> 64.
struct Attention {
    Attention(int64_t tokens, int64_t hidden, int64_t rank)
        : tokens(tokens), hidden(hidden), rank(rank), blocks(tokens / 64),
          cuts{0, static_cast<int32_t>(blocks)} {
        std::mt19937 generator(0);
        std::normal_distribution<float> normal;
        for (auto [values, size] : {std::pair{&x, tokens * hidden},
                                    {&down, rank * hidden},
                                    {&mid, rank * rank},
                                    {&up, 64 * rank}}) {
            values->resize(static_cast<size_t>(size));
            for (float& value : *values) value = normal(generator);
        }
        for (int64_t b = 0; b <= blocks; ++b) starts.push_back(static_cast<int32_t>(b * 64));
        scores.resize(static_cast<size_t>(blocks));
        ddown = down;
        dmid = mid;
        dup = up;
    }

    static lemo::Tensor matrix(std::vector<float>& values, int64_t rows, int64_t columns) {
        return {values.data(),   lemo::DType::kFloat32, lemo::Device::kCpu, 2,
                {rows, columns}, {columns, 1}};
    }

    static lemo::Tensor line(void* data, lemo::DType dtype, int64_t size) {
        return {data, dtype, lemo::Device::kCpu, 1, {size}, {1}};
    }

    lemo::PredictorParams params() {
        const lemo::PredictorWeights weights{matrix(down, rank, hidden), matrix(mid, rank, rank),
                                             matrix(up, 64, rank)};
        return {matrix(x, tokens, hidden),
                weights,
                weights,
                line(starts.data(), lemo::DType::kInt32, blocks + 1),
                line(cuts.data(), lemo::DType::kInt32, 2),
                line(scores.data(), lemo::DType::kFloat32, blocks)};
    }

    int64_t tokens, hidden, rank, blocks;
    std::vector<int32_t> starts, cuts;
    std::vector<float> x, down, mid, up, ddown, dmid, dup, scores;
};

void BM_Predictor(benchmark::State& state) {
    Attention data(state.range(0), state.range(1), state.range(2));
    const lemo::PredictorParams params = data.params();
    for (auto _ : state) lemo::predictor_cpu(params);
    state.SetItemsProcessed(state.iterations() * data.tokens);
}
BENCHMARK(BM_Predictor)->Args({8192, 384, 64})->Args({8192, 4096, 128});

void BM_PredictorBackward(benchmark::State& state) {
    Attention data(state.range(0), state.range(1), state.range(2));
    lemo::PredictorParams forward = data.params();
    const lemo::Tensor dscores = forward.scores;
    forward.scores = {};
    const lemo::PredictorWeights gradients{data.matrix(data.ddown, data.rank, data.hidden),
                                           data.matrix(data.dmid, data.rank, data.rank),
                                           data.matrix(data.dup, 64, data.rank)};
    const lemo::PredictorBackwardParams params{dscores, forward, gradients, gradients};
    for (auto _ : state) lemo::predictor_backward_cpu(params);
    state.SetItemsProcessed(state.iterations() * data.tokens);
}
BENCHMARK(BM_PredictorBackward)->Args({8192, 384, 64});

}  // namespace
