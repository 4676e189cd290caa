#include "lemo/block_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Results {
    std::vector<float> maximum, logsumexp;
};

/// Of one head of size 1.
template <typename Index>
Results attention_of(std::vector<float> q, std::vector<float> k, std::vector<Index> rows,
                     std::vector<int32_t> starts, std::vector<int32_t> cuts, double scale = 1.0) {
    const auto num_rows = static_cast<int64_t>(q.size());
    const auto tokens = static_cast<int64_t>(k.size());
    const auto blocks = static_cast<int64_t>(starts.size()) - 1;
    Results results{std::vector<float>(q.size() * static_cast<size_t>(blocks), 7.0f), {}};
    results.logsumexp = results.maximum;
    const BlockAttentionParams params{view(q, {num_rows, 1, 1}),
                                      view(k, {tokens, 1, 1}),
                                      view(rows, {static_cast<int64_t>(rows.size())}),
                                      view(starts, {blocks + 1}),
                                      view(cuts, {static_cast<int64_t>(cuts.size())}),
                                      scale,
                                      view(results.maximum, {num_rows, 1, blocks}),
                                      view(results.logsumexp, {num_rows, 1, blocks})};
    check(params);
    block_attention_cpu(params);
    return results;
}

TEST(BlockAttention, RowsSeeTheirSequenceUpToThemselves) {
    // Sequences {0, 1, 2} and {3, 4} in blocks {0, 1}, {2}, {3, 4}.
    const Results results =
        attention_of<int32_t>({2, 1, -1}, {1, 3, 5, 7, 9}, {2, 0, 3}, {0, 2, 3, 5}, {0, 2, 3}, 0.5);
    EXPECT_EQ(results.maximum, (std::vector<float>{3, 5, kNothing, 0.5f, kNothing, kNothing,
                                                   kNothing, kNothing, -3.5f}));
    EXPECT_FLOAT_EQ(results.logsumexp[0], std::log(std::exp(1.0f) + std::exp(3.0f)));
    EXPECT_EQ(results.logsumexp[1], 5.0f);
    EXPECT_EQ(results.logsumexp[2], kNothing);
    EXPECT_EQ(results.logsumexp[8], -3.5f);
}

TEST(BlockAttention, ABlockOfSeveralTiles) {
    // 2000 equal keys: the sum of as many ones. The last row but one does not see the last key.
    std::vector<float> keys(2000, 3.0f);
    keys.back() = 4.0f;
    const Results results =
        attention_of<int64_t>({100, 100}, keys, {1998, 1999}, {0, 2000}, {0, 1});
    EXPECT_EQ(results.maximum, (std::vector<float>{300, 400}));
    EXPECT_FLOAT_EQ(results.logsumexp[0], 300 + std::log(1999.0f));
    EXPECT_FLOAT_EQ(results.logsumexp[1], 400);
}

TEST(BlockAttention, NoRowsAndNoTokens) {
    EXPECT_TRUE(attention_of<int32_t>({}, {1, 2}, {}, {0, 2}, {0, 1}).maximum.empty());
    EXPECT_TRUE(attention_of<int32_t>({}, {}, {}, {0}, {0, 0}).maximum.empty());
}

TEST(BlockAttention, RowsBeyondTheTokensAreNamed) {
    try {
        attention_of<int64_t>({1, 1}, {1, 2}, {1, int64_t{1} << 32}, {0, 2}, {0, 1});
        FAIL() << "a row beyond the tokens passed";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(),
                     "[lemo:value] block_attention: argument 'rows': expected indices of the 2 "
                     "rows of 'k', got 4294967296");
    }
}

}  // namespace
}  // namespace lemo
