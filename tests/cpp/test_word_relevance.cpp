#include "lemo/word_relevance.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

struct Case {
    std::vector<int64_t> ids, firsts, ends;
    int64_t block_size;

    std::vector<float> relevance() {
        const auto tokens = static_cast<int64_t>(ids.size());
        const auto answers = static_cast<int64_t>(firsts.size());
        const int64_t blocks = block_size < 1 ? 0 : (tokens + block_size - 1) / block_size;
        std::vector<float> out(static_cast<size_t>(answers * blocks), -1.0f);
        const WordRelevanceParams params{view(ids, {tokens}), view(firsts, {answers}),
                                         view(ends, {static_cast<int64_t>(ends.size())}),
                                         block_size, view(out, {answers, blocks})};
        check(params);
        word_relevance_cpu(params);
        return out;
    }
};

/// 8 blocks of 4 different tokens each; the answer is predicted by the rows 28 to 30.
Case distinct() {
    Case made{std::vector<int64_t>(32), {28}, {31}, 4};
    std::iota(made.ids.begin(), made.ids.end(), 100);
    return made;
}

TEST(WordRelevance, IsZeroWhereNothingIsShared) {
    EXPECT_EQ(distinct().relevance(), std::vector<float>(8));
}

TEST(WordRelevance, FindsTheTokensOfTheAnswer) {
    Case made = distinct();
    made.ids[9] = made.ids[29];
    made.ids[10] = made.ids[30];
    const std::vector<float> found = made.relevance();
    for (size_t block = 0; block < 8; ++block) {
        // The block of the place has most; those whose words stand around it have less.
        EXPECT_EQ(found[block] == 1.0f, block == 2) << block;
    }
    EXPECT_GT(found[1], 0.0f);
    EXPECT_EQ(found[7], 0.0f);
}

TEST(WordRelevance, WordsOfAllBlocksWeighNothing) {
    Case made = distinct();
    for (size_t block = 0; block < 8; ++block) made.ids[4 * block + 1] = 7;  // token 29 among them
    std::vector<float> found = made.relevance();
    // In the first step nothing is shared; the second one looks for what stands around a 7.
    EXPECT_EQ(found[7], 0.0f);
    made.block_size = 32;
    EXPECT_EQ(made.relevance(), std::vector<float>(1));
}

TEST(WordRelevance, RefusesRowsThatDoNotFit) {
    Case made = distinct();
    made.ends = {33};
    EXPECT_THROW(made.relevance(), Error);
    made.ends = {28};
    EXPECT_THROW(made.relevance(), Error);
    made.ends = {31, 32};
    EXPECT_THROW(made.relevance(), Error);
    made = distinct();
    made.ids[3] = -1;
    EXPECT_THROW(made.relevance(), Error);
    made = distinct();
    made.block_size = 0;
    EXPECT_THROW(made.relevance(), Error);
}

}  // namespace
}  // namespace lemo
