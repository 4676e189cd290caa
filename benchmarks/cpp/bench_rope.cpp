#include <benchmark/benchmark.h>

#include <vector>

#include "convert.h"
#include "lemo/rope.h"

namespace {

using lemo::cpu::BFloat16;

constexpr int64_t kHeadSize = 64;

// Half of the tokens, in blocks of 64, by the tables of all of them.
void BM_Rope(benchmark::State& state) {
    const int64_t tokens = state.range(0), heads = state.range(1), kept = tokens / 2;
    std::vector<BFloat16> x(kept * heads * kHeadSize), y(x);
    std::vector<BFloat16> cos(tokens * kHeadSize), sin(cos);
    std::vector<int32_t> rows(kept);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i / 64 * 128 + i % 64);
    const auto bf16 = lemo::DType::kBFloat16;
    const auto packed = [&](std::vector<BFloat16>& values) {
        return lemo::Tensor{values.data(),
                            bf16,
                            lemo::Device::kCpu,
                            3,
                            {kept, heads, kHeadSize},
                            {heads * kHeadSize, kHeadSize, 1}};
    };
    const auto table = [&](std::vector<BFloat16>& values) {
        return lemo::Tensor{values.data(),       bf16,          lemo::Device::kCpu, 2,
                            {tokens, kHeadSize}, {kHeadSize, 1}};
    };
    const lemo::Tensor index{rows.data(), lemo::DType::kInt32, lemo::Device::kCpu, 1, {kept}, {1}};
    const lemo::RopeParams params{packed(x), table(cos), table(sin), index, false, packed(y)};
    for (auto _ : state) lemo::rope_cpu(params);
    state.SetBytesProcessed(state.iterations() * kept * heads * kHeadSize * 2 * 2);
}
BENCHMARK(BM_Rope)->Args({8192, 8});

}  // namespace
