#include "lemo/linear_cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

// Two words and one hidden unit: the second word's logit is log 3 higher for hidden state 1.
class TwoWords : public ::testing::Test {
protected:
    LinearCrossEntropyParams make(std::vector<float> states, std::vector<int64_t> targets) {
        hidden = std::move(states);
        labels = std::move(targets);
        const int64_t rows = static_cast<int64_t>(hidden.size());
        dhidden.assign(hidden.size(), -1.0f);
        LinearCrossEntropyParams params;
        params.hidden = view(hidden, {rows, 1});
        params.weight = view(weight, {2, 1});
        params.labels = view(labels, {rows});
        params.loss = view(loss, {});
        params.count = view(count, {});
        params.dhidden = view(dhidden, {rows, 1});
        return params;
    }

    std::vector<float> weight{0, std::log(3.0f)}, hidden, dhidden, loss{-1}, dweight{-1, -1};
    std::vector<int64_t> labels, count{-1};
};

TEST_F(TwoWords, LossAndGradientsByHand) {
    LinearCrossEntropyParams params = make({1, 5, 1}, {1, -100, 0});
    params.dweight = view(dweight, {2, 1});
    check(params);
    linear_cross_entropy_cpu(params);
    // Probabilities of both used rows are 1/4 and 3/4.
    EXPECT_EQ(count[0], 2);
    EXPECT_NEAR(loss[0], std::log(4.0 / 3.0) + std::log(4.0), 1e-6);
    EXPECT_NEAR(dhidden[0], -0.25 * std::log(3.0), 1e-6);
    EXPECT_EQ(dhidden[1], 0);
    EXPECT_NEAR(dhidden[2], 0.75 * std::log(3.0), 1e-6);
    EXPECT_NEAR(dweight[0], 0.25 - 0.75, 1e-6);
    EXPECT_NEAR(dweight[1], -0.25 + 0.75, 1e-6);
}

TEST_F(TwoWords, BiasShiftsTheLogits) {
    std::vector<float> bias{std::log(3.0f), 0}, dbias(2);
    LinearCrossEntropyParams params = make({1}, {1});
    params.bias = view(bias, {2});
    params.dweight = view(dweight, {2, 1});
    params.dbias = view(dbias, {2});
    check(params);
    linear_cross_entropy_cpu(params);
    EXPECT_NEAR(loss[0], std::log(2.0), 1e-6);
    EXPECT_NEAR(dbias[0], 0.5, 1e-6);
    EXPECT_NEAR(dbias[1], -0.5, 1e-6);
}

TEST_F(TwoWords, SegmentsDoNotChangeTheResult) {
    LinearCrossEntropyParams params = make({1, 2, 3, 4, 5}, {1, 0, 1, 1, 0});
    linear_cross_entropy_cpu(params);
    const std::vector<float> one_row = dhidden;
    const float one_row_loss = loss[0];
    params.chunk_rows = 3;
    linear_cross_entropy_cpu(params);
    EXPECT_FLOAT_EQ(loss[0], one_row_loss);
    for (size_t i = 0; i < one_row.size(); ++i) EXPECT_FLOAT_EQ(dhidden[i], one_row[i]);
}

TEST_F(TwoWords, MessageNamesArgumentExpectedAndGot) {
    try {
        check(make({1, 1}, {0, 2}));
        FAIL() << "a label outside the vocabulary passed";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(),
                     "[lemo:value] linear_cross_entropy: argument 'labels': expected labels in "
                     "[0, 2) or ignore_index -100, got 2 at index 1");
    }
}

}  // namespace
}  // namespace lemo
