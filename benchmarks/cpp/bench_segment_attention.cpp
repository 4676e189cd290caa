#include <benchmark/benchmark.h>

#include <vector>

#include "convert.h"
#include "lemo/segment_attention.h"

namespace {

using lemo::cpu::BFloat16;

// One causal sequence with the heads of the main job's model: 6 query and 2 kv heads of 64.
struct Problem {
    static constexpr int64_t kHeads = 6, kKvHeads = 2, kHeadSize = 64;

    explicit Problem(int64_t rows)
        : cuts{0, static_cast<int32_t>(rows)}, q(fill(rows * kHeads * kHeadSize)),
          k(fill(rows * kKvHeads * kHeadSize)), v(k), out(q.size()),
          lse(static_cast<size_t>(rows * kHeads)) {
        forward.q = heads(q, rows, kHeads);
        forward.k = heads(k, rows, kKvHeads);
        forward.v = heads(v, rows, kKvHeads);
        forward.cu_q =
            forward.cu_k = {cuts.data(), lemo::DType::kInt32, lemo::Device::kCpu, 1, {2}, {1}};
        forward.scale = 0.125f;
        forward.out = heads(out, rows, kHeads);
        forward.lse = {lse.data(), lemo::DType::kFloat32, lemo::Device::kCpu,
                       2,          {kHeads, rows},        {rows, 1}};
    }

    static std::vector<BFloat16> fill(int64_t size) {
        std::vector<BFloat16> values(static_cast<size_t>(size));
        for (size_t i = 0; i < values.size(); ++i) {
            const float value = static_cast<float>(i * 2654435761u % 1000) / 500.0f - 1.0f;
            lemo::cpu::store(&values[i], value);
        }
        return values;
    }

    static lemo::Tensor heads(std::vector<BFloat16>& values, int64_t rows, int64_t heads) {
        return {values.data(),
                lemo::DType::kBFloat16,
                lemo::Device::kCpu,
                3,
                {rows, heads, kHeadSize},
                {heads * kHeadSize, kHeadSize, 1}};
    }

    /// Operations of `products` causal products of all heads.
    static double flops(int64_t rows, int products) {
        return static_cast<double>(products * rows * rows * kHeads * kHeadSize);
    }

    std::vector<int32_t> cuts;
    std::vector<BFloat16> q, k, v, out;
    std::vector<float> lse;
    lemo::SegmentAttentionParams forward;
};

void set_flops(benchmark::State& state, int products) {
    state.counters["FLOP/s"] = benchmark::Counter(Problem::flops(state.range(0), products),
                                                  benchmark::Counter::kIsIterationInvariantRate);
}

void BM_SegmentAttention(benchmark::State& state) {
    const Problem problem(state.range(0));
    for (auto _ : state) lemo::segment_attention_cpu(problem.forward);
    set_flops(state, 2);
}
BENCHMARK(BM_SegmentAttention)->Arg(1024)->Arg(4096)->Arg(8192)->UseRealTime();

void BM_SegmentAttentionBackward(benchmark::State& state) {
    Problem problem(state.range(0));
    lemo::segment_attention_cpu(problem.forward);
    auto dout = Problem::fill(static_cast<int64_t>(problem.q.size()));
    auto dq = problem.q, dk = problem.k, dv = problem.v;
    const int64_t rows = state.range(0);
    const lemo::SegmentAttentionBackwardParams params{problem.forward,
                                                      true,
                                                      Problem::heads(dout, rows, Problem::kHeads),
                                                      Problem::heads(dq, rows, Problem::kHeads),
                                                      Problem::heads(dk, rows, Problem::kKvHeads),
                                                      Problem::heads(dv, rows, Problem::kKvHeads),
                                                      {}};
    for (auto _ : state) lemo::segment_attention_backward_cpu(params);
    set_flops(state, 5);
}
BENCHMARK(BM_SegmentAttentionBackward)->Arg(1024)->Arg(4096)->Arg(8192)->UseRealTime();

}  // namespace
