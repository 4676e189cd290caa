#include "lemo/bf16_split.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// The three blocks of one row.
std::vector<float> split(std::vector<float> x, float scale, bool left, bool by_blocks = false) {
    const int64_t n = static_cast<int64_t>(x.size()) / (by_blocks ? 3 : 1);
    std::vector<cpu::BFloat16> y(static_cast<size_t>(3 * n));
    const Bf16SplitParams params{by_blocks ? view(x, {1, 3, n}) : view(x, {1, n}),
                                 view(y, {1, 3, n}), scale, left};
    check(params);
    bf16_split_cpu(params);
    std::vector<float> found;
    for (const cpu::BFloat16 value : y) found.push_back(cpu::load(value));
    return found;
}

TEST(Bf16Split, HandComputed) {
    // Numbers of bf16 between 1 and 2 are 2^-7 apart: this one is nearer to 1 + 2^-7 than to 1, so
    // the rest is negative.
    const float x = 1 + 0x1p-8f + 0x1p-12f, high = 1 + 0x1p-7f, low = 0x1p-12f - 0x1p-8f;
    EXPECT_EQ(split({x, 2}, 1, false), (std::vector<float>{high, 2, low, 0, high, 2}));
    EXPECT_EQ(split({x, 2}, 1, true), (std::vector<float>{high, 2, high, 2, low, 0}));
    EXPECT_EQ(split({x}, -2, true), (std::vector<float>{-2 * high, -2 * high, -2 * low}));
}

TEST(Bf16Split, BlocksAreAddedUp) {
    EXPECT_EQ(split({1, 5, 0x1p-9f, 7, 99, NAN}, 0.5f, true, true),
              (std::vector<float>{0.5f, 6, 0.5f, 6, 0x1p-10f, 0}));
}

TEST(Bf16Split, MatricesLieOneBehindAnother) {
    std::vector<float> first{1, 2}, second{3, 1 + 0x1p-12f};
    std::vector<cpu::BFloat16> y(12);
    const Bf16SplitAllParams params{{view(first, {2, 1}), view(second, {1, 2})}, view(y, {12})};
    check(params);
    bf16_split_all_cpu(params);
    std::vector<float> found;
    for (const cpu::BFloat16 value : y) found.push_back(cpu::load(value));
    EXPECT_EQ(found, (std::vector<float>{1, 0, 1, 2, 0, 2, 3, 1, 0, 0x1p-12f, 3, 1}));
}

TEST(Bf16Split, EndsOfTheNumberRange) {
    const float most = std::numeric_limits<float>::max();  // rounds to infinity
    for (const float x : {kInfinity, -kInfinity, most}) {
        const float end = std::copysign(kInfinity, x);
        EXPECT_EQ(split({x}, 1, true), (std::vector<float>{end, end, 0}));
    }
    EXPECT_TRUE(std::isnan(split({NAN}, 1, true)[0]));
}

TEST(Bf16Split, MessageNamesArgumentExpectedAndGot) {
    std::vector<float> x(6);
    std::vector<cpu::BFloat16> y(18);
    const auto message = [&](const auto& params) {
        try {
            check(params);
        } catch (const Error& error) {
            return std::string(error.what());
        }
        return std::string();
    };
    EXPECT_EQ(message(Bf16SplitParams{view(x, {2, 3}), view(y, {2, 3, 3}), kInfinity, true}),
              "[lemo:value] bf16_split: argument 'scale': expected a finite number, got inf");
    EXPECT_EQ(message(Bf16SplitParams{view(x, {3, 2, 1}), view(y, {3, 3, 1}), 1, true}),
              "[lemo:value] bf16_split: argument 'x': expected size 3 in "
              "dimension 1 (the blocks of a row), got float32 [3, 2, 1] on cpu");
    EXPECT_NE(message(Bf16SplitParams{view(y, {2, 9}), view(y, {2, 3, 3}), 1, true}), "");
    EXPECT_NE(message(Bf16SplitParams{view(x, {2, 3}), view(y, {2, 3, 2}), 1, true}), "");
    EXPECT_EQ(message(Bf16SplitAllParams{{view(x, {2, 3})}, view(y, {18})}), "");
    EXPECT_EQ(message(Bf16SplitAllParams{{view(x, {2, 3}), view(x, {1, 1})}, view(y, {18})}),
              "[lemo:value] bf16_split_all: argument 'y': expected size 21 in dimension 0 (three "
              "blocks of all matrices), got bfloat16 [18] on cpu");
    EXPECT_NE(message(Bf16SplitAllParams{{view(y, {2, 3})}, view(y, {18})}), "");
}

}  // namespace
}  // namespace lemo
