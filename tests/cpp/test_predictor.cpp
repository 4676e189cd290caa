#include "lemo/predictor.h"

#include <gtest/gtest.h>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

// One number for each token, and maps of one unit: f(x) = up * max(mid * max(down * x, 0), 0).
struct Case {
    std::vector<float> x{1, -5, 3, 2};
    std::vector<float> down{2}, mid{1}, key_up{10}, query_up{1};
    std::vector<int32_t> starts{0, 2, 3, 4}, cuts{0, 2, 3};
    std::vector<float> scores = std::vector<float>(3);

    PredictorParams params(bool has_queries) {
        PredictorWeights query{};
        if (has_queries) query = {view(down, {1, 1}), view(mid, {1, 1}), view(query_up, {1, 1})};
        return {view(x, {4, 1}), {view(down, {1, 1}), view(mid, {1, 1}), view(key_up, {1, 1})},
                query,           view(starts, {4}),
                view(cuts, {3}), view(scores, {3})};
    }
};

TEST(Predictor, MeanOverTheBlockWithoutQueries) {
    Case data;
    const PredictorParams params = data.params(false);
    check(params);
    predictor_cpu(params);
    // Block 0: (2 + 0) / 2 * 10, block 1: 6 * 10, block 2: 4 * 10.
    EXPECT_EQ(data.scores, (std::vector<float>{10, 60, 40}));
}

TEST(Predictor, KeyTimesTheMeanQueryOfLaterBlocks) {
    Case data;
    const PredictorParams params = data.params(true);
    check(params);
    predictor_cpu(params);
    // Queries 1 and 6, then 4: 10 * (1 + 6) / 2, 60 * 6, 40 * 4.
    EXPECT_EQ(data.scores, (std::vector<float>{35, 360, 160}));
}

TEST(Predictor, BackwardOfEveryMap) {
    Case data;
    std::vector<float> dscores{1, 0, 2}, ddown(1), dmid(1), dup(1);
    PredictorParams forward = data.params(false);
    forward.scores = Tensor{};
    const PredictorBackwardParams params{
        view(dscores, {3}),
        forward,
        {view(ddown, {1, 1}), view(dmid, {1, 1}), view(dup, {1, 1})},
        PredictorWeights{}};
    check(params);
    predictor_backward_cpu(params);
    EXPECT_EQ(dup[0], 1 * 1 + 2 * 4);
    EXPECT_EQ(dmid[0], 10 * (1 * 2 / 2 + 2 * 4));
    EXPECT_EQ(ddown[0], 10 * (1.0f / 2 + 2 * 2));
}

TEST(Predictor, MessageNamesArgumentExpectedAndGot) {
    Case data;
    PredictorParams params = data.params(true);
    params.query.up = Tensor{};
    try {
        check(params);
        FAIL() << "a query predictor without its last map passed";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(),
                     "[lemo:value] predictor: argument 'q_up': expected a tensor, as 'q_down' is "
                     "one, got None");
    }
}

}  // namespace
}  // namespace lemo
