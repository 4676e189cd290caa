#include "lemo/segment_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <utility>

#include "compare.h"
#include "device_views.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::expect_close;
using testing::expect_same_bits;
using testing::random_rows;
using testing::random_values;
using testing::view;
using testing::widen;

struct Case {
    const char* name;
    std::vector<int64_t> lengths;
    int64_t heads, kv_heads, head_dim;
    double query_share = 1, key_share = 1;  // of the tokens that ask and that answer
    bool positions = true;
    int64_t window = 0, group_size = 0;
    int64_t value_dim = 0;         // 0: as head_dim
    float softcap = 0, scale = 0;  // scale 0: 1 / sqrt(head_dim)
    bool sinks = false;

    int64_t values() const { return value_dim > 0 ? value_dim : head_dim; }
};

/// Rows of some of the tokens of every sequence.
struct RowSet {
    RowSet(const std::vector<int64_t>& lengths, double share, uint32_t seed) : cu{0} {
        for (const int64_t length : lengths) {
            const auto kept = static_cast<int64_t>(std::ceil(share * static_cast<double>(length)));
            const auto rows = random_rows(length, kept, seed++);
            positions.insert(positions.end(), rows.begin(), rows.end());
            cu.push_back(static_cast<int32_t>(positions.size()));
        }
    }

    int64_t size() const { return static_cast<int64_t>(positions.size()); }

    std::vector<int32_t> positions, cu;
};

template <typename T>
struct Results {
    std::vector<T> out, dq, dk, dv;
    std::vector<float> lse, dsinks;
};

/// Inputs of one case, and what the CPU and the GPU make of them.
template <typename T>
class Attention {
public:
    explicit Attention(const Case& the_case)
        : case_(the_case), queries_(the_case.lengths, the_case.query_share, 1),
          // Equal shares: the same rows ask and answer.
          keys_(the_case.lengths, the_case.key_share, 1),
          q_(random_values<T>(queries_.size() * case_.heads * case_.head_dim, 3)),
          k_(random_values<T>(keys_.size() * case_.kv_heads * case_.head_dim, 4)),
          v_(random_values<T>(keys_.size() * case_.kv_heads * case_.values(), 5)),
          dout_(random_values<T>(queries_.size() * case_.heads * case_.values(), 6)),
          sinks_(random_values<float>(case_.sinks ? case_.heads : 0, 7)) {}

    Results<float> on_cpu() {
        auto q = widen(q_), k = widen(k_), v = widen(v_), dout = widen(dout_);
        auto sinks = sinks_;
        Results<float> results{std::vector<float>(dout.size()), std::vector<float>(q.size()),
                               std::vector<float>(k.size()),    std::vector<float>(v.size()),
                               std::vector<float>(num_lse()),   std::vector<float>(sinks.size())};
        SegmentAttentionParams params = settings("auto");
        params.q = view(q, query_shape());
        params.k = view(k, key_shape());
        params.v = view(v, value_shape());
        if (case_.sinks) params.sinks = view(sinks, {case_.heads});
        params.cu_q = view(queries_.cu, {cuts()});
        params.cu_k = view(keys_.cu, {cuts()});
        if (case_.positions) {
            params.q_positions = view(queries_.positions, {queries_.size()});
            params.k_positions = view(keys_.positions, {keys_.size()});
        }
        params.out = view(results.out, out_shape());
        params.lse = view(results.lse, {case_.heads, queries_.size()});
        check(params);
        segment_attention_cpu(params);
        segment_attention_backward_cpu(
            {params, true, view(dout, out_shape()), view(results.dq, query_shape()),
             view(results.dk, key_shape()), view(results.dv, value_shape()),
             case_.sinks ? view(results.dsinks, {case_.heads}) : Tensor{}});
        return results;
    }

    Results<T> on_gpu(std::string_view kernel, bool deterministic) const {
        const DeviceArray<T> q(q_), k(k_), v(v_), dout(dout_);
        const DeviceArray<int32_t> cu_q(queries_.cu), cu_k(keys_.cu);
        const DeviceArray<int32_t> q_positions(queries_.positions), k_positions(keys_.positions);
        const DeviceArray<T> out(dout_.size()), dq(q_.size()), dk(k_.size()), dv(v_.size());
        const DeviceArray<float> lse(num_lse()), sinks(sinks_), dsinks(sinks_.size());
        SegmentAttentionParams params = settings(kernel);
        params.q = q.view(query_shape());
        params.k = k.view(key_shape());
        params.v = v.view(value_shape());
        if (case_.sinks) params.sinks = sinks.view({case_.heads});
        params.cu_q = cu_q.view({cuts()});
        params.cu_k = cu_k.view({cuts()});
        if (case_.positions) {
            params.q_positions = q_positions.view({queries_.size()});
            params.k_positions = k_positions.view({keys_.size()});
        }
        params.out = out.view(out_shape());
        params.lse = lse.view({case_.heads, queries_.size()});
        check(params);
        const testing::Scratch scratch(segment_attention_scratch_bytes(params));
        params.scratch = scratch.data();
        segment_attention_cuda(params, nullptr);

        SegmentAttentionBackwardParams backward{
            params,
            deterministic,
            dout.view(out_shape()),
            dq.view(query_shape()),
            dk.view(key_shape()),
            dv.view(value_shape()),
            case_.sinks ? dsinks.view({case_.heads}) : Tensor{}};
        check(backward);
        const testing::Scratch backward_scratch(segment_attention_scratch_bytes(backward));
        backward.scratch = backward_scratch.data();
        segment_attention_backward_cuda(backward, nullptr);
        return {out.download(), dq.download(),  dk.download(),
                dv.download(),  lse.download(), dsinks.download()};
    }

    /// The gradient of the sinks by its formula, from the output and lse that the kernels stored.
    /// The terms of its sum nearly cancel, which enlarges the rounding of the output as much as it
    /// happens to; from the same output nothing is rounded below fp32.
    std::vector<float> sink_gradients(const Results<T>& results) const {
        const auto out = widen(results.out), dout = widen(dout_);
        std::vector<float> gradients;
        for (size_t head = 0; head < sinks_.size(); ++head) {
            double sum = 0;
            for (size_t row = 0; row < static_cast<size_t>(queries_.size()); ++row) {
                const auto columns = static_cast<size_t>(case_.values());
                const size_t first = (row * sinks_.size() + head) * columns;
                double delta = 0;
                for (size_t i = first; i < first + columns; ++i) {
                    delta += double{out[i]} * double{dout[i]};
                }
                const double lse = results.lse[head * static_cast<size_t>(queries_.size()) + row];
                sum -= std::exp(sinks_[head] - lse) * delta;
            }
            gradients.push_back(static_cast<float>(sum));
        }
        return gradients;
    }

private:
    SegmentAttentionParams settings(std::string_view kernel) const {
        SegmentAttentionParams params;
        params.scale =
            case_.scale != 0 ? case_.scale : 1.0f / std::sqrt(static_cast<float>(case_.head_dim));
        params.softcap = case_.softcap;
        params.window = case_.window;
        params.group_size = case_.group_size;
        params.kernel = kernel;
        return params;
    }

    std::vector<int64_t> query_shape() const {
        return {queries_.size(), case_.heads, case_.head_dim};
    }
    std::vector<int64_t> key_shape() const {
        return {keys_.size(), case_.kv_heads, case_.head_dim};
    }
    std::vector<int64_t> value_shape() const {
        return {keys_.size(), case_.kv_heads, case_.values()};
    }
    std::vector<int64_t> out_shape() const {
        return {queries_.size(), case_.heads, case_.values()};
    }
    int64_t cuts() const { return static_cast<int64_t>(queries_.cu.size()); }
    size_t num_lse() const { return static_cast<size_t>(case_.heads * queries_.size()); }

    Case case_;
    RowSet queries_, keys_;
    std::vector<T> q_, k_, v_, dout_;
    std::vector<float> sinks_;
};

const std::vector<Case>& cases() {
    static const std::vector<Case> list{
        {"one short sequence", {37}, 2, 2, 64, 1, 1, false},
        {"tiles and a rest", {300}, 2, 1, 128, 1, 1, false},
        {"whole tiles", {256}, 4, 4, 64, 1, 1, false},
        {"several sequences", {1, 130, 0, 77, 64}, 4, 2, 128, 1, 1, false},
        {"a head size between", {70, 20}, 2, 2, 80, 1, 1, false},
        {"half of the tokens", {200, 90}, 8, 2, 128, 0.5, 0.5},
        {"all keys", {260, 33}, 4, 1, 64, 0.4, 1},
        {"few keys", {150, 90}, 2, 2, 128, 1, 0.1},
        {"window", {300}, 2, 1, 64, 0.7, 0.7, true, 40},
        {"groups", {280, 61}, 4, 2, 128, 0.6, 0.6, true, 0, 96},
        {"window in groups", {280}, 4, 4, 64, 1, 1, true, 50, 96},
        {"rings that go round", {900, 350}, 4, 1, 128, 0.9, 0.9},
        {"small heads, long", {1100}, 3, 3, 64, 1, 1, false},
        {"no rows", {0, 0}, 2, 2, 64, 1, 1},
    };
    return list;
}

bool runs_hopper() {
    cudaDeviceProp properties;
    testing::require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    return properties.major == 9 && properties.minor == 0;
}

/// The kernels that this GPU runs, deterministic or not.
std::vector<std::pair<const char*, bool>> kernels() {
    std::vector<std::pair<const char*, bool>> list{
        {"portable", true}, {"portable", false}, {"portable-small", true}};
    if (runs_hopper()) list.insert(list.end(), {{"hopper", true}, {"hopper", false}});
    return list;
}

/// Caps, sinks and head sizes of models, in every tile of the kernels.
const std::vector<Case>& cases_of_models() {
    static const std::vector<Case> list{
        {.name = "sinks",
         .lengths = {300, 20},
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 64,
         .positions = false,
         .window = 128,
         .sinks = true},
        {.name = "sinks, other keys",
         .lengths = {260, 33},
         .heads = 4,
         .kv_heads = 1,
         .head_dim = 128,
         .query_share = 0.9,
         .key_share = 0.1,
         .sinks = true},
        {.name = "cap",
         .lengths = {300, 90},
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 128,
         .positions = false,
         .softcap = 1.5f},
        {.name = "cap, small heads",
         .lengths = {300},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 64,
         .query_share = 0.7,
         .key_share = 0.7,
         .window = 100,
         .softcap = 0.5f,
         .scale = -0.3f},
        {.name = "cap and sinks, groups",
         .lengths = {280, 61},
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 128,
         .query_share = 0.6,
         .key_share = 0.8,
         .group_size = 96,
         .softcap = 2,
         .sinks = true},
        {.name = "96",
         .lengths = {300, 70},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 96,
         .positions = false},
        {.name = "256",
         .lengths = {300, 1, 0, 170},
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 256,
         .positions = false},
        {.name = "256, kept rows",
         .lengths = {500, 170},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 256,
         .query_share = 0.8,
         .key_share = 0.7,
         .window = 200,
         .sinks = true},
        {.name = "256, cap",
         .lengths = {420, 170},
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 256,
         .query_share = 0.8,
         .key_share = 0.8,
         .softcap = 1,
         .sinks = true},
        {.name = "256, few keys",
         .lengths = {300, 90},
         .heads = 2,
         .kv_heads = 2,
         .head_dim = 256,
         .query_share = 1,
         .key_share = 0.05},
        {.name = "192 and 128",
         .lengths = {400, 77},
         .heads = 4,
         .kv_heads = 4,
         .head_dim = 192,
         .positions = false,
         .value_dim = 128},
        {.name = "192 and 128, kept rows",
         .lengths = {500, 77},
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 192,
         .query_share = 0.7,
         .key_share = 0.6,
         .window = 300,
         .value_dim = 128,
         .softcap = 3,
         .sinks = true},
        {.name = "72 and 128",
         .lengths = {200, 77},
         .heads = 2,
         .kv_heads = 2,
         .head_dim = 72,
         .positions = false,
         .value_dim = 128},
        {.name = "128 and 64",
         .lengths = {200, 77},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 128,
         .positions = false,
         .value_dim = 64,
         .softcap = 2},
        {.name = "160 and 96",
         .lengths = {150},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 160,
         .positions = false,
         .value_dim = 96},
        {.name = "192",
         .lengths = {200},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 192,
         .positions = false},
        // Walks longer than the rings of buffers, in several heads and sequences.
        {.name = "256, many tiles",
         .lengths = {700, 1, 0, 330},
         .heads = 4,
         .kv_heads = 1,
         .head_dim = 256,
         .query_share = 0.9,
         .key_share = 0.8},
        {.name = "256, window in groups",
         .lengths = {500, 64},
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 256,
         .window = 70,
         .group_size = 128},
        {.name = "256, cap, negative scale",
         .lengths = {500},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 256,
         .query_share = 0.7,
         .key_share = 0.9,
         .window = 150,
         .softcap = 0.5f,
         .scale = -0.3f},
        {.name = "192 and 128, many tiles",
         .lengths = {700, 0, 1, 330},
         .heads = 6,
         .kv_heads = 2,
         .head_dim = 192,
         .query_share = 0.9,
         .key_share = 0.8,
         .value_dim = 128,
         .sinks = true},
        {.name = "192 and 128, window in groups",
         .lengths = {500, 64},
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 192,
         .window = 70,
         .group_size = 128,
         .value_dim = 128},
        {.name = "192 and 128, few keys",
         .lengths = {300, 90},
         .heads = 2,
         .kv_heads = 2,
         .head_dim = 192,
         .query_share = 1,
         .key_share = 0.05,
         .value_dim = 128},
        {.name = "no rows",
         .lengths = {0, 0},
         .heads = 2,
         .kv_heads = 2,
         .head_dim = 256,
         .positions = false,
         .sinks = true},
    };
    return list;
}

template <typename T>
class SegmentAttentionCuda : public ::testing::Test {};
TYPED_TEST_SUITE(SegmentAttentionCuda, testing::LowPrecisionTypes);

template <typename T>
void expect_cpu_results(const std::vector<Case>& list) {
    for (const Case& the_case : list) {
        Attention<T> attention(the_case);
        const Results<float> oracle = attention.on_cpu();
        for (const auto& [kernel, deterministic] : kernels()) {
            const Results<T> results = attention.on_gpu(kernel, deterministic);
            const std::string what = std::string(the_case.name) + ", " + kernel;
            // Probabilities are rounded on the way to out, and so are their gradients.
            expect_close(results.out, oracle.out, what + ": out", 2);
            expect_close(results.dq, oracle.dq, what + ": dq", 2);
            expect_close(results.dk, oracle.dk, what + ": dk", 2);
            expect_close(results.dv, oracle.dv, what + ": dv", 2);
            expect_close(results.lse, oracle.lse, what + ": lse");
            expect_close(results.dsinks, attention.sink_gradients(results), what + ": dsinks");
        }
    }
}

TYPED_TEST(SegmentAttentionCuda, MatchesCpu) { expect_cpu_results<TypeParam>(cases()); }

TYPED_TEST(SegmentAttentionCuda, ModelsMatchCpu) {
    expect_cpu_results<TypeParam>(cases_of_models());
}

TYPED_TEST(SegmentAttentionCuda, SmallShapesOfModelsMatchCpu) {
    expect_cpu_results<TypeParam>({
        {.name = "cap and sinks",
         .lengths = {150, 130},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 128,
         .positions = false,
         .softcap = 2,
         .sinks = true},
        {.name = "256",
         .lengths = {190},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 256,
         .positions = false},
        {.name = "256, cap",
         .lengths = {190},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 256,
         .query_share = 0.9,
         .key_share = 0.5,
         .softcap = 2,
         .sinks = true},
        {.name = "192 and 128",
         .lengths = {190},
         .heads = 2,
         .kv_heads = 1,
         .head_dim = 192,
         .positions = false,
         .value_dim = 128},
        {.name = "more tiles",
         .lengths = std::vector<int64_t>(14, 10),
         .heads = 24,
         .kv_heads = 6,
         .head_dim = 192,
         .positions = false,
         .value_dim = 128},
    });
}

TYPED_TEST(SegmentAttentionCuda, SmallShapesMatchCpu) {
    // Three tiles of keys and a rest, each seen by several heads; both head sizes; other keys; more
    // tiles of queries than the thread blocks that stay on the GPU.
    expect_cpu_results<TypeParam>(
        {{"three tiles", {390}, 2, 1, 64, 1, 1, false},
         {"two sequences", {150, 130}, 2, 1, 128, 1, 1, false},
         {"other keys", {140}, 2, 2, 128, 0.8, 0.8, true, 0, 64},
         {"more tiles", std::vector<int64_t>(14, 10), 24, 6, 64, 1, 1, false}});
}

TYPED_TEST(SegmentAttentionCuda, MoreTilesThanASecondDimensionOfAGrid) {
    // A tile for each sequence that is not empty: 67500 of queries, and as many of keys. The second
    // dimension of a grid ends at 65535.
    std::vector<int64_t> lengths(90000);
    for (size_t i = 0; i < lengths.size(); ++i) lengths[i] = static_cast<int64_t>(i % 4);
    expect_cpu_results<TypeParam>({{"many sequences", lengths, 1, 1, 8, 1, 1, false}});
}

TYPED_TEST(SegmentAttentionCuda, DeterministicRepeatsAreBitEqual) {
    for (const auto& [kernel, deterministic] : kernels()) {
        if (!deterministic) continue;
        std::vector<Case> many_tiles;
        for (const int64_t head_dim : {64, 128, 192, 256}) {
            many_tiles.push_back({"many tiles", {700, 260}, 4, 2, head_dim, 0.8, 0.8});
        }
        many_tiles.push_back({.name = "192 and 128",
                              .lengths = {700, 260},
                              .heads = 4,
                              .kv_heads = 2,
                              .head_dim = 192,
                              .query_share = 0.8,
                              .key_share = 0.8,
                              .value_dim = 128});
        many_tiles.push_back({.name = "cap",
                              .lengths = {700, 260},
                              .heads = 4,
                              .kv_heads = 2,
                              .head_dim = 256,
                              .query_share = 0.8,
                              .key_share = 0.8,
                              .softcap = 2});
        for (const Case& the_case : many_tiles) {
            const Attention<TypeParam> attention(the_case);
            const Results<TypeParam> first = attention.on_gpu(kernel, true);
            for (int repeat = 0; repeat < 10; ++repeat) {
                const Results<TypeParam> again = attention.on_gpu(kernel, true);
                expect_same_bits(again.out, first.out, std::string(kernel) + ": out");
                expect_same_bits(again.dq, first.dq, std::string(kernel) + ": dq");
                expect_same_bits(again.dk, first.dk, std::string(kernel) + ": dk");
                expect_same_bits(again.dv, first.dv, std::string(kernel) + ": dv");
                expect_same_bits(again.dsinks, first.dsinks, std::string(kernel) + ": dsinks");
            }
        }
    }
}

TEST(SegmentAttentionCuda, Fp32IsRefused) {
    const DeviceArray<float> q(64);
    SegmentAttentionParams params;
    params.q = q.view({1, 1, 64});
    try {
        segment_attention_cuda(params, nullptr);
        FAIL() << "fp32 passed";
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kUnsupported);
    }
}

}  // namespace
}  // namespace lemo
