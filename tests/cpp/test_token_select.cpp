#include "lemo/token_select.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

// Three sequences: 5 blocks of 2 rows (the last one ragged), none, and one block of 1 row.
struct Layout {
    std::vector<int32_t> block_starts{0, 2, 4, 6, 8, 9, 10};
    std::vector<int32_t> cu_blocks{0, 5, 5, 6};
};

struct Chosen {
    std::vector<int32_t> kept_blocks, cu_rows;
};

Chosen choose(std::vector<float> scores, std::string_view policy, double value, int64_t keep_first,
              int64_t keep_last) {
    Layout layout;
    std::vector<int32_t> places(12), cu_kept(4), cu_rows(4);
    std::vector<int64_t> counts(2);
    const TokenSelectParams params{view(scores, {6}),
                                   view(layout.block_starts, {7}),
                                   view(layout.cu_blocks, {4}),
                                   policy,
                                   value,
                                   keep_first,
                                   keep_last,
                                   view(places, {6, 2}),
                                   view(cu_kept, {4}),
                                   view(cu_rows, {4}),
                                   view(counts, {2})};
    check(params);
    token_select_cpu(params);
    EXPECT_EQ(counts[0], cu_kept.back());
    EXPECT_EQ(counts[1], cu_rows.back());

    std::vector<int32_t> kept(static_cast<size_t>(counts[0]));
    std::vector<int32_t> rows(static_cast<size_t>(counts[1])), positions(rows);
    const TokenRowsParams rows_params{params.block_starts,     params.cu_blocks,
                                      params.places,           params.cu_kept,
                                      params.cu_rows,          view(kept, {counts[0]}),
                                      view(rows, {counts[1]}), view(positions, {counts[1]})};
    check(rows_params);
    token_rows_cpu(rows_params);
    return {kept, cu_rows};
}

using Blocks = std::vector<int32_t>;

TEST(TokenSelect, RatioCountsForcedBlocksAndBreaksTiesToTheEarlierBlock) {
    const std::vector<float> scores{0, 1, 2, 2, 0, 0};
    const Chosen half = choose(scores, "ratio", 0.5, 1, 1);  // 3 of 5: both ends and one more
    EXPECT_EQ(half.kept_blocks, (Blocks{0, 2, 4, 5}));
    EXPECT_EQ(half.cu_rows, (Blocks{0, 5, 5, 6}));
    EXPECT_EQ(choose(scores, "ratio", 0.2, 0, 0).kept_blocks, (Blocks{2, 5}));
    EXPECT_EQ(choose(scores, "ratio", 0.6, 0, 0).kept_blocks, (Blocks{1, 2, 3, 5}));
    EXPECT_EQ(choose(scores, "ratio", 0.0, 0, 0).kept_blocks, Blocks{});
    EXPECT_EQ(choose(scores, "ratio", 0.0, 2, 1).kept_blocks, (Blocks{0, 1, 4, 5}));
    EXPECT_EQ(choose(scores, "ratio", 1.0, 9, 9).kept_blocks, (Blocks{0, 1, 2, 3, 4, 5}));
}

TEST(TokenSelect, ThresholdKeepsWhatReachesIt) {
    const std::vector<float> scores{0, 1, 2, 3, 0, 5};
    EXPECT_EQ(choose(scores, "threshold", 2.0, 0, 0).kept_blocks, (Blocks{2, 3, 5}));
    EXPECT_EQ(choose(scores, "threshold", 9.0, 1, 0).kept_blocks, (Blocks{0, 5}));
    const double infinity = std::numeric_limits<double>::infinity();
    EXPECT_EQ(choose(scores, "threshold", infinity, 0, 0).kept_blocks, Blocks{});
}

TEST(TokenSelect, RowsAndPositionsOfKeptBlocks) {
    Layout layout;
    // Blocks 1 and 4 of the first sequence, and the last sequence.
    std::vector<int32_t> places{-1, -1, 0, 0, -1, -1, -1, -1, 1, 2, 0, 0};
    std::vector<int32_t> cu_kept{0, 2, 2, 3}, cu_rows{0, 3, 3, 4};
    std::vector<int32_t> kept(3), rows(4), positions(4);
    TokenRowsParams params{view(layout.block_starts, {7}),
                           view(layout.cu_blocks, {4}),
                           view(places, {6, 2}),
                           view(cu_kept, {4}),
                           view(cu_rows, {4}),
                           view(kept, {3}),
                           view(rows, {4}),
                           view(positions, {4})};
    check(params);
    token_rows_cpu(params);
    EXPECT_EQ(kept, (Blocks{1, 4, 5}));
    EXPECT_EQ(rows, (Blocks{2, 3, 8, 9}));
    EXPECT_EQ(positions, (Blocks{2, 3, 8, 0}));

    params.kept_blocks = view(kept, {2});
    try {
        check(params);
        FAIL() << "a wrong size passed";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(),
                     "[lemo:value] token_select: argument 'num_kept_blocks': expected 3, what the "
                     "policy keeps, got 2");
    }
}

TEST(TokenSelect, MessageNamesArgumentExpectedAndGot) {
    const auto message = [](std::vector<float> scores, std::string_view policy, double value) {
        try {
            choose(std::move(scores), policy, value, 1, 1);
        } catch (const Error& error) {
            return std::string(error.what());
        }
        return std::string("nothing was thrown");
    };
    const std::vector<float> scores(6);
    EXPECT_EQ(message(scores, "best", 0.5),
              "[lemo:value] token_select: argument 'policy': expected 'ratio' or 'threshold', got "
              "'best'");
    EXPECT_EQ(message(scores, "ratio", 1.5),
              "[lemo:value] token_select: argument 'value': expected a share between 0 and 1, got "
              "1.500000");
    const float nan = std::numeric_limits<float>::quiet_NaN();
    EXPECT_EQ(message({0, 0, nan, 0, 0, 0}, "ratio", 0.5),
              "[lemo:value] token_select: argument 'scores': expected numbers, got nan for "
              "block 2");
}

}  // namespace
}  // namespace lemo
