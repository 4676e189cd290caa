#include "lemo/select_norm.h"

#include <gtest/gtest.h>

#include <cmath>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

TEST(SelectNorm, RmsOfSelectedRows) {
    std::vector<float> x{3, 4, 9, 9, 1, 7}, weight{2, 10}, y(4), kept(4), mean, rstd(2);
    std::vector<int32_t> rows{0, 2};
    const SelectNormParams params{
        view(x, {3, 2}), view(rows, {2}), view(weight, {2}),  Tensor{},        0.0,
        "rms",           view(y, {2, 2}), view(kept, {2, 2}), view(mean, {0}), view(rstd, {2})};
    check(params);
    select_norm_cpu(params);
    EXPECT_EQ(kept, (std::vector<float>{3, 4, 1, 7}));
    EXPECT_FLOAT_EQ(rstd[0], 1 / std::sqrt(12.5f));
    EXPECT_FLOAT_EQ(y[0], 3 * 2 / std::sqrt(12.5f));
    EXPECT_FLOAT_EQ(y[3], 7 * 10 / 5.0f);
}

TEST(SelectNorm, LayerNormSubtractsTheMean) {
    std::vector<float> x{1, 5}, weight{1, 2}, bias{10, 20}, y(2), mean(1), rstd(1);
    const SelectNormParams params{
        view(x, {1, 2}), Tensor{},        view(weight, {2}), view(bias, {2}), 0.0,
        "layer",         view(y, {1, 2}), Tensor{},          view(mean, {1}), view(rstd, {1})};
    check(params);
    select_norm_cpu(params);
    EXPECT_FLOAT_EQ(mean[0], 3);
    EXPECT_FLOAT_EQ(rstd[0], 0.5f);
    EXPECT_FLOAT_EQ(y[0], 10 - 1);
    EXPECT_FLOAT_EQ(y[1], 20 + 2);
}

TEST(SelectNorm, BackwardAddsIntoTheSelectedRows) {
    // x = (1, -1), eps = 1: rstd = 1/sqrt(2), normal = (1, -1) / sqrt(2); with dy * weight = (2, 0)
    // the mean of g * normal is 1/sqrt(2), so dx = rstd * ((2, 0) - (1, -1) / 2).
    const float rstd_value = 1 / std::sqrt(2.0f);
    std::vector<float> dy{2, 0}, x{1, -1}, weight{1, 3}, mean, rstd{rstd_value}, dx{5, 5, 5, 5};
    std::vector<float> dweight(2);
    std::vector<int32_t> rows{1};
    const SelectNormBackwardParams params{
        view(dy, {1, 2}), view(x, {1, 2}), view(rows, {1}),  view(weight, {2}),  view(mean, {0}),
        view(rstd, {1}),  "rms",           view(dx, {2, 2}), view(dweight, {2}), Tensor{}};
    check(params);
    select_norm_backward_cpu(params);
    EXPECT_EQ(dx[0], 5);
    EXPECT_EQ(dx[1], 5);
    EXPECT_FLOAT_EQ(dx[2], 5 + rstd_value * 1.5f);
    EXPECT_FLOAT_EQ(dx[3], 5 + rstd_value * 0.5f);
    EXPECT_FLOAT_EQ(dweight[0], 2 * rstd_value);
    EXPECT_FLOAT_EQ(dweight[1], 0);
}

TEST(SelectNorm, StatisticsOnAnotherDeviceAreRefused) {
    std::vector<float> dy(2), x(2), weight(2), mean(1), rstd(1), dx(2);
    const SelectNormBackwardParams params{
        view(dy, {1, 2}), view(x, {1, 2}), Tensor{},         view(weight, {2}), view(mean, {1}),
        view(rstd, {1}),  "layer",         view(dx, {1, 2}), Tensor{},          Tensor{}};
    EXPECT_NO_THROW(check(params));
    for (const bool is_mean : {true, false}) {
        SelectNormBackwardParams moved = params;
        (is_mean ? moved.mean : moved.rstd).device = Device::kCuda;
        try {
            check(moved);
            FAIL() << "statistics on a GPU passed";
        } catch (const Error& error) {
            EXPECT_STREQ(
                error.what(),
                (std::string("[lemo:value] select_norm_backward: argument '") +
                 (is_mean ? "mean" : "rstd") + "': expected the device of 'dx' (cpu), got cuda:0")
                    .c_str());
        }
    }
}

TEST(SelectNorm, MessageNamesArgumentExpectedAndGot) {
    std::vector<float> x(2), weight(2), y(2), mean, rstd(1);
    try {
        check(SelectNormParams{view(x, {1, 2}), Tensor{}, view(weight, {2}), view(weight, {2}),
                               1e-5, "rms", view(y, {1, 2}), Tensor{}, view(mean, {0}),
                               view(rstd, {1})});
        FAIL() << "RMSNorm with a bias passed";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(),
                     "[lemo:value] select_norm: argument 'bias': expected None for kind 'rms', got "
                     "float32 [2] on cpu");
    }
}

}  // namespace
}  // namespace lemo
