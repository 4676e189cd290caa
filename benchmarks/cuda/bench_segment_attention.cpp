#include <cmath>

#include "convert.h"
#include "lemo/segment_attention.h"
#include "random_values.h"
#include "timing.h"

namespace {

using lemo::Tensor;
using lemo::cpu::BFloat16;
using lemo::testing::DeviceArray;

// One causal sequence of `tokens` rows; Llama-3-8B has 32 query heads and 8 of keys and values.
struct Sequence {
    explicit Sequence(const benchmark::State& state)
        : tokens(state.range(0)), heads(state.range(1)), kv_heads(state.range(2)),
          head_dim(state.range(3)), q(random(heads, 1)), k(random(kv_heads, 2)),
          v(random(kv_heads, 3)), dout(random(heads, 4)), out(q.size()), dq(q.size()), dk(k.size()),
          dv(v.size()), lse(heads * tokens),
          cu(std::vector<int32_t>{0, static_cast<int32_t>(tokens)}) {}

    std::vector<BFloat16> random(int64_t num_heads, uint32_t seed) const {
        // A short sample, repeated: drawing every number would take longer than the benchmark.
        const auto sample = lemo::testing::random_values<BFloat16>(1 << 16, seed);
        std::vector<BFloat16> values(static_cast<size_t>(tokens * num_heads * head_dim));
        for (size_t i = 0; i < values.size(); ++i) values[i] = sample[i % sample.size()];
        return values;
    }

    Tensor of_queries(const DeviceArray<BFloat16>& array) const {
        return array.view({tokens, heads, head_dim});
    }
    Tensor of_keys(const DeviceArray<BFloat16>& array) const {
        return array.view({tokens, kv_heads, head_dim});
    }

    lemo::SegmentAttentionParams forward() const {
        lemo::SegmentAttentionParams params;
        params.q = of_queries(q);
        params.k = of_keys(k);
        params.v = of_keys(v);
        params.cu_q = params.cu_k = cu.view({2});
        params.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
        params.out = of_queries(out);
        params.lse = lse.view({heads, tokens});
        return params;
    }

    // `products` of tokens x tokens x head_dim, half of them behind the diagonal.
    void report(benchmark::State& state, int products) const {
        const double pairs = static_cast<double>(tokens) * static_cast<double>(tokens) / 2;
        state.counters["FLOPS"] =
            benchmark::Counter(2.0 * products * pairs * static_cast<double>(heads * head_dim),
                               benchmark::Counter::kIsIterationInvariantRate);
    }

    int64_t tokens, heads, kv_heads, head_dim;
    DeviceArray<BFloat16> q, k, v, dout, out, dq, dk, dv;
    DeviceArray<float> lse;
    DeviceArray<int32_t> cu;
};

void BM_SegmentAttention(benchmark::State& state) {
    const Sequence data(state);
    lemo::SegmentAttentionParams params = data.forward();
    const lemo::testing::Scratch scratch(segment_attention_scratch_bytes(params));
    params.scratch = scratch.data();
    lemo::bench::measure(state, [&](void* stream) { segment_attention_cuda(params, stream); });
    data.report(state, 2);
}
BENCHMARK(BM_SegmentAttention)
    ->Args({16384, 32, 8, 128})
    ->Args({16384, 32, 8, 64})
    ->UseManualTime();

void BM_SegmentAttentionBackward(benchmark::State& state) {
    const Sequence data(state);
    lemo::SegmentAttentionParams forward = data.forward();
    const lemo::testing::Scratch scratch(segment_attention_scratch_bytes(forward));
    forward.scratch = scratch.data();
    segment_attention_cuda(forward, nullptr);

    lemo::SegmentAttentionBackwardParams params{forward,
                                                state.range(4) != 0,
                                                data.of_queries(data.dout),
                                                data.of_queries(data.dq),
                                                data.of_keys(data.dk),
                                                data.of_keys(data.dv),
                                                {}};
    const lemo::testing::Scratch backward_scratch(segment_attention_scratch_bytes(params));
    params.scratch = backward_scratch.data();
    lemo::bench::measure(state,
                         [&](void* stream) { segment_attention_backward_cuda(params, stream); });
    data.report(state, 5);
}
// The last argument: deterministic.
BENCHMARK(BM_SegmentAttentionBackward)
    ->Args({16384, 32, 8, 128, 0})
    ->Args({16384, 32, 8, 128, 1})
    ->Args({16384, 32, 8, 64, 0})
    ->UseManualTime();

}  // namespace
