#include "lemo/segment_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "attention_plan.h"
#include "exp2.h"
#include "lemo/check.h"
#include "tanh.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(Blocks, VisiblePositionsAreARange) {
    const auto seen = [](int64_t position, int64_t window, int64_t group_size, int64_t shift) {
        const Range range = visible_positions(position, window, group_size, shift);
        return std::pair{range.first, range.end};
    };
    EXPECT_EQ(seen(5, 0, 0, 0), (std::pair<int64_t, int64_t>{0, 6}));
    EXPECT_EQ(seen(5, 2, 0, 0), (std::pair<int64_t, int64_t>{4, 6}));
    EXPECT_EQ(seen(5, 6, 0, 0), (std::pair<int64_t, int64_t>{0, 6}));
    EXPECT_EQ(seen(5, 0, 4, 0), (std::pair<int64_t, int64_t>{4, 6}));
    EXPECT_EQ(seen(5, 0, 4, 2), (std::pair<int64_t, int64_t>{2, 6}));
    EXPECT_EQ(seen(5, 3, 4, 2), (std::pair<int64_t, int64_t>{3, 6}));
}

TEST(Exp2, StaysWithinItsStatedError) {
    for (float x = -125.0f; x < 127.0f; x += 0.00371f) {
        const double exact = std::exp2(static_cast<double>(x));
        ASSERT_NEAR(cpu::exp2_fast(x) / exact, 1.0, 2.5e-7) << x;
    }
    EXPECT_EQ(cpu::exp2_fast(0.0f), 1.0f);
    EXPECT_EQ(cpu::exp2_fast(-kInfinity), 0x1p-126f);
    EXPECT_TRUE(std::isnan(cpu::exp2_fast(std::numeric_limits<float>::quiet_NaN())));
}

// One head of size 1 with scale 1: scores are plain products of q and k.
class OneHead : public ::testing::Test {
protected:
    SegmentAttentionParams make(std::vector<int32_t> query_cuts, std::vector<int32_t> key_cuts) {
        cu_q = std::move(query_cuts);
        cu_k = std::move(key_cuts);
        const int64_t rows = cu_q.back(), keys = cu_k.back();
        q.resize(static_cast<size_t>(rows), 0.0f);
        k.resize(static_cast<size_t>(keys), 0.0f);
        v.resize(static_cast<size_t>(keys), 0.0f);
        out.assign(static_cast<size_t>(rows), -1.0f);
        lse.assign(static_cast<size_t>(rows), -1.0f);
        SegmentAttentionParams params;
        params.q = view(q, {rows, 1, 1});
        params.k = view(k, {keys, 1, 1});
        params.v = view(v, {keys, 1, 1});
        params.cu_q = view(cu_q, {static_cast<int64_t>(cu_q.size())});
        params.cu_k = view(cu_k, {static_cast<int64_t>(cu_k.size())});
        params.out = view(out, {rows, 1, 1});
        params.lse = view(lse, {1, rows});
        return params;
    }

    std::vector<float> q, k, v, out, lse;
    std::vector<int32_t> cu_q, cu_k;
};

TEST_F(OneHead, EqualScoresAverageTheValuesSeenSoFar) {
    v = {2, 4, 9, 100, 300};
    const SegmentAttentionParams params = make({0, 3, 5}, {0, 3, 5});
    check(params);
    segment_attention_cpu(params);
    const std::vector<float> averages{2, 3, 5, 100, 200}, counts{1, 2, 3, 1, 2};
    for (size_t i = 0; i < averages.size(); ++i) {
        EXPECT_FLOAT_EQ(out[i], averages[i]);
        EXPECT_NEAR(lse[i], std::log(counts[i]), 1e-6);
    }
}

TEST_F(OneHead, PositionsDecideWhatIsSeen) {
    v = {8, 16};
    SegmentAttentionParams params = make({0, 3}, {0, 2});
    std::vector<int32_t> q_positions{1, 4, 9}, k_positions{2, 7};
    params.q_positions = view(q_positions, {3});
    params.k_positions = view(k_positions, {2});
    check(params);
    segment_attention_cpu(params);
    EXPECT_EQ(out, (std::vector<float>{0, 8, 12}));
    EXPECT_EQ(lse[0], -kInfinity);

    params.window = 3;
    segment_attention_cpu(params);
    EXPECT_EQ(out, (std::vector<float>{0, 8, 16}));
}

TEST_F(OneHead, BackwardOfTwoTokensByHand) {
    // Row 1 weighs its values by w = sigmoid of the score difference q (k0 - k1).
    q = {1, 1};
    k = {std::log(3.0f), 0};
    v = {1, 5};
    const SegmentAttentionParams forward = make({0, 2}, {0, 2});
    segment_attention_cpu(forward);
    EXPECT_NEAR(out[1], 0.75 * 1 + 0.25 * 5, 1e-6);

    std::vector<float> dout{1, 1}, dq(2), dk(2), dv(2);
    const SegmentAttentionBackwardParams params{forward,
                                                true,
                                                view(dout, {2, 1, 1}),
                                                view(dq, {2, 1, 1}),
                                                view(dk, {2, 1, 1}),
                                                view(dv, {2, 1, 1}),
                                                {}};
    check(params);
    segment_attention_backward_cpu(params);
    const float dscore = 0.75f * 0.25f * (1 - 5);  // d out / d (score of key 0)
    EXPECT_NEAR(dq[0], 0, 1e-6);
    EXPECT_NEAR(dq[1], dscore * std::log(3.0f), 1e-6);
    EXPECT_NEAR(dk[0], dscore, 1e-6);
    EXPECT_NEAR(dk[1], -dscore, 1e-6);
    EXPECT_NEAR(dv[0], 1.75, 1e-6);
    EXPECT_NEAR(dv[1], 0.25, 1e-6);
}

TEST_F(OneHead, SoftcapBoundsTheScores) {
    q = {1, 1};
    k = {2, 0};
    v = {1, 5};
    SegmentAttentionParams params = make({0, 2}, {0, 2});
    params.softcap = 0.5f;
    check(params);
    segment_attention_cpu(params);
    const double score = 0.5 * std::tanh(2 / 0.5), weight = 1 / (1 + std::exp(-score));
    EXPECT_NEAR(lse[0], score, 1e-6);
    EXPECT_NEAR(out[1], weight * 1 + (1 - weight) * 5, 1e-6);

    std::vector<float> dout{0, 1}, dq(2), dk(2), dv(2);
    segment_attention_backward_cpu({params,
                                    true,
                                    view(dout, {2, 1, 1}),
                                    view(dq, {2, 1, 1}),
                                    view(dk, {2, 1, 1}),
                                    view(dv, {2, 1, 1}),
                                    {}});
    const double slope = 1 - std::pow(std::tanh(2 / 0.5), 2);
    EXPECT_NEAR(dk[0], weight * (1 - weight) * (1 - 5) * slope, 1e-6);
    // At a score of 0 the cap has the slope 1.
    EXPECT_NEAR(dk[1], -weight * (1 - weight) * (1 - 5), 1e-6);
    EXPECT_NEAR(dq[1], dk[0] * 2, 1e-6);
}

TEST_F(OneHead, SinkTakesItsShareOfTheWeights) {
    // Row 1 sees two keys of score 0 and a sink of weight 2: half of everything.
    v = {2, 6};
    SegmentAttentionParams params = make({0, 2}, {0, 2});
    std::vector<float> sinks{std::log(2.0f)};
    params.sinks = view(sinks, {1});
    check(params);
    segment_attention_cpu(params);
    EXPECT_NEAR(out[0], 2.0 / 3, 1e-6);
    EXPECT_NEAR(out[1], (2.0 + 6.0) / 4, 1e-6);
    EXPECT_NEAR(lse[1], std::log(4.0), 1e-6);

    std::vector<float> dout{0, 1}, dq(2), dk(2), dv(2), dsinks(1);
    const SegmentAttentionBackwardParams backward{
        params,
        true,
        view(dout, {2, 1, 1}),
        view(dq, {2, 1, 1}),
        view(dk, {2, 1, 1}),
        view(dv, {2, 1, 1}),
        view(dsinks, {1}),
    };
    check(backward);
    segment_attention_backward_cpu(backward);
    EXPECT_NEAR(dv[0], 0.25, 1e-6);
    EXPECT_NEAR(dsinks[0], -0.5 * 2, 1e-6);
}

TEST_F(OneHead, GradientOfSinksIsWantedWhereThereAreSinks) {
    const SegmentAttentionParams forward = make({0, 2}, {0, 2});
    std::vector<float> dout(2), dq(2), dk(2), dv(2), dsinks(1);
    const SegmentAttentionBackwardParams params{
        forward,
        true,
        view(dout, {2, 1, 1}),
        view(dq, {2, 1, 1}),
        view(dk, {2, 1, 1}),
        view(dv, {2, 1, 1}),
        view(dsinks, {1}),
    };
    EXPECT_THROW(check(params), Error);
}

TEST(Tanh, StaysWithinItsStatedError) {
    for (float x = -20.0f; x < 20.0f; x += 0.00037f) {
        const double exact = std::tanh(static_cast<double>(x));
        ASSERT_NEAR(cpu::tanh_fast(x), exact, 1e-6 * std::abs(exact)) << x;
    }
    EXPECT_EQ(cpu::tanh_fast(0.0f), 0.0f);
    EXPECT_EQ(cpu::tanh_fast(kInfinity), 1.0f);
    EXPECT_EQ(cpu::tanh_fast(-kInfinity), -1.0f);
    EXPECT_TRUE(std::isnan(cpu::tanh_fast(std::numeric_limits<float>::quiet_NaN())));
}

TEST_F(OneHead, PlanKeepsTilesWithinSequences) {
    const SegmentAttentionParams params = make({0, 5, 5, 7}, {0, 5, 6, 8});
    const cpu::AttentionPlan plan(params, 2);
    EXPECT_EQ(plan.tiles.size(), 4u);
    EXPECT_EQ(plan.tiles[2].first, 4);
    EXPECT_EQ(plan.tiles[2].end, 5);
    EXPECT_EQ(plan.keys(3, 0).first, 6);
    EXPECT_EQ(plan.keys(3, 0).end, 8);
    EXPECT_EQ(plan.keys(0, 0).end, 2);
}

TEST_F(OneHead, MessageNamesArgumentExpectedAndGot) {
    SegmentAttentionParams params = make({0, 2}, {0, 2});
    params.window = -2;
    try {
        check(params);
        FAIL() << "a negative window passed";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(),
                     "[lemo:value] segment_attention: argument 'window': expected at least 0, "
                     "got -2");
    }
}

}  // namespace
}  // namespace lemo
