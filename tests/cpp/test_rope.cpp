#include "lemo/rope.h"

#include <gtest/gtest.h>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

// Two rows of two heads of size 4, the tables of three positions.
struct Heads {
    std::vector<float> x{1, 2, 3, 4, 5, 6, 7, 8, 1, 0, 0, 1, 2, 2, 2, 2};
    std::vector<float> cos{9, 9, 9, 9, 1, 2, 3, 4, 0, 1, 0, 1};
    std::vector<float> sin{9, 9, 9, 9, 5, 6, 7, 8, 1, 0, 2, 0};
    std::vector<int32_t> rows{1, 2};
    std::vector<float> y = std::vector<float>(16);

    RopeParams params(bool transposed) {
        return {view(x, {2, 2, 4}), view(cos, {3, 4}), view(sin, {3, 4}),
                view(rows, {2}),    transposed,        view(y, {2, 2, 4})};
    }
};

TEST(Rope, RotatesTheHalvesOfEveryHead) {
    Heads heads;
    check(heads.params(false));
    rope_cpu(heads.params(false));
    EXPECT_EQ(heads.y, (std::vector<float>{1 - 15, 4 - 24, 9 + 7, 16 + 16,     //
                                           5 - 35, 12 - 48, 21 + 35, 32 + 48,  //
                                           0 - 0, 0, 0 + 2, 1,                 //
                                           0 - 2, 2, 0 + 4, 2}));
}

TEST(Rope, TransposedMapIsTheAdjoint) {
    Heads forward, backward;
    backward.x = {2, -1, 3, 5, 1, 1, -2, 0, 4, 3, 2, 1, 0, 7, 1, -3};
    rope_cpu(forward.params(false));
    rope_cpu(backward.params(true));
    float left = 0, right = 0;  // <y, dy> = <x, dx>, exactly: all numbers are small integers
    for (size_t i = 0; i < 16; ++i) {
        left += forward.y[i] * backward.x[i];
        right += forward.x[i] * backward.y[i];
    }
    EXPECT_EQ(left, right);
}

TEST(Rope, MessageNamesArgumentExpectedAndGot) {
    const auto message = [](const RopeParams& params) {
        try {
            check(params);
        } catch (const Error& error) {
            return std::string(error.what());
        }
        return std::string("nothing was thrown");
    };
    Heads heads;
    heads.rows = {1, 3};
    EXPECT_EQ(message(heads.params(false)),
              "[lemo:value] rope: argument 'rows': expected rows of the tables, below 3, got 3 at "
              "index 1");
    RopeParams params = heads.params(false);
    params.rows = Tensor{};
    EXPECT_EQ(message(params),
              "[lemo:value] rope: argument 'cos': expected size 2 in dimension 0 (the rows of 'x', "
              "as 'rows' is None), got float32 [3, 4] on cpu");
    params.x = view(heads.x, {2, 8, 1});
    EXPECT_EQ(message(params),
              "[lemo:value] rope: argument 'x': expected an even head size, got float32 [2, 8, 1] "
              "on cpu");
}

}  // namespace
}  // namespace lemo
