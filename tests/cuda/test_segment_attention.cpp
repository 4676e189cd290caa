#include "lemo/segment_attention.h"

#include <gtest/gtest.h>

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
    std::vector<float> lse;
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
          v_(random_values<T>(k_.size(), 5)), dout_(random_values<T>(q_.size(), 6)) {}

    Results<float> on_cpu() {
        auto q = widen(q_), k = widen(k_), v = widen(v_), dout = widen(dout_);
        Results<float> results{std::vector<float>(q.size()), std::vector<float>(q.size()),
                               std::vector<float>(k.size()), std::vector<float>(v.size()),
                               std::vector<float>(num_lse())};
        SegmentAttentionParams params = settings("auto");
        params.q = view(q, query_shape());
        params.k = view(k, key_shape());
        params.v = view(v, key_shape());
        params.cu_q = view(queries_.cu, {cuts()});
        params.cu_k = view(keys_.cu, {cuts()});
        if (case_.positions) {
            params.q_positions = view(queries_.positions, {queries_.size()});
            params.k_positions = view(keys_.positions, {keys_.size()});
        }
        params.out = view(results.out, query_shape());
        params.lse = view(results.lse, {case_.heads, queries_.size()});
        check(params);
        segment_attention_cpu(params);
        segment_attention_backward_cpu(
            {params, true, view(dout, query_shape()), view(results.dq, query_shape()),
             view(results.dk, key_shape()), view(results.dv, key_shape())});
        return results;
    }

    Results<T> on_gpu(std::string_view kernel, bool deterministic) const {
        const DeviceArray<T> q(q_), k(k_), v(v_), dout(dout_);
        const DeviceArray<int32_t> cu_q(queries_.cu), cu_k(keys_.cu);
        const DeviceArray<int32_t> q_positions(queries_.positions), k_positions(keys_.positions);
        const DeviceArray<T> out(q_.size()), dq(q_.size()), dk(k_.size()), dv(v_.size());
        const DeviceArray<float> lse(num_lse());
        SegmentAttentionParams params = settings(kernel);
        params.q = q.view(query_shape());
        params.k = k.view(key_shape());
        params.v = v.view(key_shape());
        params.cu_q = cu_q.view({cuts()});
        params.cu_k = cu_k.view({cuts()});
        if (case_.positions) {
            params.q_positions = q_positions.view({queries_.size()});
            params.k_positions = k_positions.view({keys_.size()});
        }
        params.out = out.view(query_shape());
        params.lse = lse.view({case_.heads, queries_.size()});
        check(params);
        const testing::Scratch scratch(segment_attention_scratch_bytes(params));
        params.scratch = scratch.data();
        segment_attention_cuda(params, nullptr);

        SegmentAttentionBackwardParams backward{params,
                                                deterministic,
                                                dout.view(query_shape()),
                                                dq.view(query_shape()),
                                                dk.view(key_shape()),
                                                dv.view(key_shape())};
        check(backward);
        const testing::Scratch backward_scratch(segment_attention_scratch_bytes(backward));
        backward.scratch = backward_scratch.data();
        segment_attention_backward_cuda(backward, nullptr);
        return {out.download(), dq.download(), dk.download(), dv.download(), lse.download()};
    }

private:
    SegmentAttentionParams settings(std::string_view kernel) const {
        SegmentAttentionParams params;
        params.scale = 1.0f / std::sqrt(static_cast<float>(case_.head_dim));
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
    int64_t cuts() const { return static_cast<int64_t>(queries_.cu.size()); }
    size_t num_lse() const { return static_cast<size_t>(case_.heads * queries_.size()); }

    Case case_;
    RowSet queries_, keys_;
    std::vector<T> q_, k_, v_, dout_;
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

/// The kernels that this GPU runs, deterministic or not.
std::vector<std::pair<const char*, bool>> kernels() {
    std::vector<std::pair<const char*, bool>> list{
        {"portable", true}, {"portable", false}, {"portable-small", true}};
    cudaDeviceProp properties;
    testing::require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    if (properties.major == 9 && properties.minor == 0) {
        list.insert(list.end(), {{"hopper", true}, {"hopper", false}});
    }
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
        }
    }
}

TYPED_TEST(SegmentAttentionCuda, MatchesCpu) { expect_cpu_results<TypeParam>(cases()); }

TYPED_TEST(SegmentAttentionCuda, SmallShapesMatchCpu) {
    // Three tiles of keys and a rest, each seen by several heads; both head sizes; other keys; more
    // tiles of queries than the thread blocks that stay on the GPU.
    expect_cpu_results<TypeParam>(
        {{"three tiles", {390}, 2, 1, 64, 1, 1, false},
         {"two sequences", {150, 130}, 2, 1, 128, 1, 1, false},
         {"other keys", {140}, 2, 2, 128, 0.8, 0.8, true, 0, 64},
         {"more tiles", std::vector<int64_t>(14, 10), 24, 6, 64, 1, 1, false}});
}

TYPED_TEST(SegmentAttentionCuda, DeterministicRepeatsAreBitEqual) {
    for (const auto& [kernel, deterministic] : kernels()) {
        if (!deterministic) continue;
        for (const int64_t head_dim : {64, 128}) {
            const Attention<TypeParam> attention(
                {"many tiles", {700, 260}, 4, 2, head_dim, 0.8, 0.8});
            const Results<TypeParam> first = attention.on_gpu(kernel, true);
            for (int repeat = 0; repeat < 10; ++repeat) {
                const Results<TypeParam> again = attention.on_gpu(kernel, true);
                expect_same_bits(again.out, first.out, std::string(kernel) + ": out");
                expect_same_bits(again.dq, first.dq, std::string(kernel) + ": dq");
                expect_same_bits(again.dk, first.dk, std::string(kernel) + ": dk");
                expect_same_bits(again.dv, first.dv, std::string(kernel) + ": dv");
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
