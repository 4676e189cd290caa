#include "lemo/block_scores.h"

#include <gtest/gtest.h>

#include <limits>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

std::vector<float> scores_of(std::vector<float> q, std::vector<float> k,
                             std::vector<int32_t> starts, std::vector<int32_t> cuts, double scale) {
    const int64_t rows = static_cast<int64_t>(q.size());
    std::vector<float> scores(starts.size() - 1, -1.0f);
    const int64_t blocks = static_cast<int64_t>(scores.size());
    const BlockScoresParams params{view(q, {rows, 1, 1}),
                                   view(k, {rows, 1, 1}),
                                   view(starts, {blocks + 1}),
                                   view(cuts, {static_cast<int64_t>(cuts.size())}),
                                   scale,
                                   view(scores, {blocks})};
    check(params);
    block_scores_cpu(params);
    return scores;
}

TEST(BlockScores, MeanOfMaximaOverTheQueryBlocksThatSeeTheKeyBlock) {
    // Blocks {0, 1} and {2}. Block 0: itself max(2 * 1) = 2, asked by row 2 max(3 * 1, 3 * 5) = 15.
    EXPECT_EQ(scores_of({9, 2, 3}, {1, 5, 7}, {0, 2, 3}, {0, 2}, 1.0),
              (std::vector<float>{8.5f, 0}));
}

TEST(BlockScores, SequencesDoNotSeeEachOther) {
    EXPECT_EQ(scores_of({1, 1, 1, 1}, {2, 3, 4, 5}, {0, 1, 2, 3, 4}, {0, 2, 2, 4}, 0.5),
              (std::vector<float>{0.5f, 0, 1, 0}));
}

TEST(BlockScores, NoTokens) {
    EXPECT_EQ(scores_of({}, {}, {0}, {0, 0}, 1.0), std::vector<float>{});
}

TEST(BlockScores, MessageNamesArgumentExpectedAndGot) {
    try {
        scores_of({1}, {1}, {0, 1}, {0, 1}, -std::numeric_limits<double>::infinity());
        FAIL() << "a negative infinite scale passed";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(),
                     "[lemo:value] block_scores: argument 'scale': expected a finite number above "
                     "0, got -inf");
    }
}

}  // namespace
}  // namespace lemo
