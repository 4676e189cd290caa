#include "lemo/swiglu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

std::vector<float> swiglu(std::vector<float> gate, std::vector<float> up) {
    const int64_t n = static_cast<int64_t>(gate.size());
    std::vector<float> y(gate.size());
    const SwigluParams params{view(gate, {1, n}), view(up, {1, n}), view(y, {1, n})};
    check(params);
    swiglu_cpu(params);
    return y;
}

TEST(Swiglu, HandComputed) {
    const float log3 = std::log(3.0f);  // its sigmoid is 3/4
    const auto y = swiglu({0, log3, -log3}, {7, 2, 4});
    EXPECT_EQ(y[0], 0.0f);
    EXPECT_NEAR(y[1], 1.5f * log3, 1e-6f);
    EXPECT_NEAR(y[2], -log3, 1e-6f);
}

TEST(Swiglu, FarFromZero) {
    const auto y = swiglu({-3e38f, -1e4f, -100, 100, 3e38f}, {1, 1, 1, 1, 1});
    EXPECT_EQ(y[0], 0.0f);
    EXPECT_EQ(y[1], 0.0f);
    EXPECT_NEAR(y[2], 0.0f, 1e-30f);
    EXPECT_EQ(y[3], 100.0f);
    EXPECT_EQ(y[4], 3e38f);
    EXPECT_TRUE(std::isnan(swiglu({std::numeric_limits<float>::quiet_NaN()}, {1})[0]));
}

TEST(Swiglu, BackwardOverwritesItsInputsWithTheirGradients) {
    const float log3 = std::log(3.0f);
    std::vector<float> dout{1, 2}, gate{0, log3}, up{4, 5};
    const SwigluBackwardParams params{view(dout, {2, 1}), view(gate, {2, 1}), view(up, {2, 1})};
    check(params);
    swiglu_backward_cpu(params);
    EXPECT_NEAR(gate[0], 2.0f, 1e-6f);  // 1 * 4 * sigmoid(0)
    EXPECT_NEAR(gate[1], 10 * 0.75f * (1 + log3 / 4), 1e-5f);
    EXPECT_EQ(up[0], 0.0f);
    EXPECT_NEAR(up[1], 1.5f * log3, 1e-6f);
}

TEST(Swiglu, MessageNamesArgumentExpectedAndGot) {
    std::vector<float> gate(6), y(6);
    std::vector<cpu::Float16> half(6);
    try {
        check(SwigluParams{view(gate, {2, 3}), view(half, {2, 3}), view(y, {2, 3})});
        FAIL() << "another dtype passed";
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kType);
        EXPECT_STREQ(error.what(),
                     "[lemo:type] swiglu: argument 'up': expected the dtype of 'gate' (float32), "
                     "got float16");
    }
    EXPECT_THROW(
        check(SwigluBackwardParams{view(y, {3, 2}), view(gate, {2, 3}), view(gate, {2, 3})}),
        Error);
}

}  // namespace
}  // namespace lemo
