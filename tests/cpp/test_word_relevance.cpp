#include "lemo/word_relevance.h"

#include <gtest/gtest.h>

#include <limits>
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
        const int64_t blocks = block_size < 1 ? 0 : (tokens - 1) / block_size + 1;
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

TEST(WordRelevance, WordsOfTheQuestionCountWhereTheyStand) {
    // 13 to 27 come before the row 28; its block, the last one, has labels.
    const std::vector<float> found = distinct().relevance();
    const std::vector<float> expected{0, 0, 0, 3.0f / 15, 4.0f / 15, 4.0f / 15, 4.0f / 15, 0};
    for (size_t block = 0; block < 8; ++block) EXPECT_FLOAT_EQ(found[block], expected[block]);
}

TEST(WordRelevance, FindsThePlaceOfTheAnswer) {
    Case made = distinct();
    for (size_t i = 0; i < 3; ++i) made.ids[8 + i] = made.ids[29 + i];
    const std::vector<float> found = made.relevance();
    // Windows of 16 tokens around the tokens 8 to 10 reach all blocks but the one with labels.
    for (size_t block = 0; block < 7; ++block) EXPECT_GT(found[block], 0.0f) << block;
    // The question begins in the block behind it.
    for (size_t block = 0; block < 3; ++block) EXPECT_GE(found[2], found[block]) << block;
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
    // Beyond int32 the number of blocks would overflow.
    for (const int64_t size : {int64_t{0}, std::numeric_limits<int64_t>::max()}) {
        made.block_size = size;
        EXPECT_THROW(made.relevance(), Error) << size;
    }
}

}  // namespace
}  // namespace lemo
