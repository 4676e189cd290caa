#include "convert.h"
#include "lemo/blocks.h"
#include "lemo/predictor.h"
#include "random_values.h"
#include "timing.h"

namespace {

using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;
using lemo::testing::random_values;

struct Net {
    Net(int64_t hidden, int64_t rank, int64_t outputs)
        : hidden(hidden), rank(rank), outputs(outputs),
          down(random_values<BFloat16>(rank * hidden, 1)),
          mid(random_values<BFloat16>(rank * rank, 2)),
          up(random_values<BFloat16>(outputs * rank, 3)) {}

    lemo::PredictorWeights weights() const {
        return {down.view({rank, hidden}), mid.view({rank, rank}), up.view({outputs, rank})};
    }

    int64_t hidden, rank, outputs;
    DeviceArray<BFloat16> down, mid, up;
};

// One sequence in blocks of 64; arguments: tokens, hidden size, rank, whether of attention.
void BM_Predictor(benchmark::State& state) {
    const int64_t tokens = state.range(0), hidden = state.range(1), rank = state.range(2);
    const bool attention = state.range(3) != 0;
    const lemo::BlockPlan plan = lemo::plan_blocks({tokens}, 64);
    const auto blocks = static_cast<int64_t>(plan.block_starts.size()) - 1;
    const DeviceArray<BFloat16> x(random_values<BFloat16>(tokens * hidden, 4));
    const Net key(hidden, rank, attention ? rank : 1), query(hidden, rank, rank);
    const DeviceArray<int32_t> starts(plan.block_starts), cuts(plan.cu_blocks);
    const DeviceArray<float> scores(static_cast<size_t>(blocks));
    lemo::PredictorParams params{x.view({tokens, hidden}),
                                 key.weights(),
                                 attention ? query.weights() : lemo::PredictorWeights{},
                                 starts.view({blocks + 1}),
                                 cuts.view({2}),
                                 scores.view({blocks})};
    const lemo::testing::Scratch scratch(predictor_scratch_bytes(params));
    params.scratch = scratch.data();
    lemo::bench::measure(state, [&](void* stream) { predictor_cuda(params, stream); });
    const double flops = 2.0 * static_cast<double>(tokens * rank) *
                         static_cast<double>(hidden + rank) * (attention ? 2 : 1);
    state.counters["FLOP/s"] = benchmark::Counter(
        flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}
BENCHMARK(BM_Predictor)->Args({65536, 4096, 256, 1})->Args({65536, 4096, 256, 0})->UseManualTime();

}  // namespace
