#include "lemo/fp8_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

struct Rows {
    std::vector<uint8_t> values;
    std::vector<float> scales;
};

Rows fp8_rows(std::vector<float> x, int64_t rows, std::vector<float> columns = {}) {
    const int64_t n = static_cast<int64_t>(x.size()) / rows;
    Rows found{std::vector<uint8_t>(x.size()), std::vector<float>(static_cast<size_t>(rows))};
    const Fp8RowsParams params{view(x, {rows, n}), columns.empty() ? Tensor{} : view(columns, {n}),
                               view(found.scales, {rows, 1}), found.values.data()};
    check(params);
    fp8_rows_cpu(params);
    return found;
}

TEST(Fp8Rows, HandComputed) {
    // Scale 1. 17 is in the middle between 16 and 18, 19 between 18 and 20: to even.
    const auto [values, scales] = fp8_rows({448, -448, 1, 17, 19, 0.015625f, 0.0029296875f, 0}, 1);
    EXPECT_EQ(scales, std::vector<float>{1});
    EXPECT_EQ(values, (std::vector<uint8_t>{0x7e, 0xfe, 0x38, 0x58, 0x5a, 0x08, 0x02, 0x00}));
}

TEST(Fp8Rows, RowsHaveScalesOfTheirOwn) {
    const auto [values, scales] = fp8_rows({1, -2, 3.5f, 7}, 2);
    EXPECT_EQ(scales, (std::vector<float>{2.0f / 448, 7.0f / 448}));
    EXPECT_EQ(values, (std::vector<uint8_t>{0x76, 0xfe, 0x76, 0x7e}));
}

TEST(Fp8Rows, ColumnsAreMultipliedFirst) {
    const auto [values, scales] = fp8_rows({1, 2, -4, 1}, 2, {4, 1});
    EXPECT_EQ(scales, (std::vector<float>{4.0f / 448, 16.0f / 448}));
    EXPECT_EQ(values, (std::vector<uint8_t>{0x7e, 0x76, 0xfe, 0x5e}));
}

TEST(Fp8Rows, ZerosAndWhatIsNotFinite) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    const auto [values, scales] = fp8_rows({0, -0.0f, 1, NAN, 1, kInf}, 3);
    EXPECT_GT(scales[0], 0.0f);
    EXPECT_EQ(values[0], 0x00);
    EXPECT_EQ(values[1], 0x80);
    EXPECT_EQ(values[3] & 0x7f, 0x7f);
    EXPECT_TRUE(std::isinf(scales[2]));
    EXPECT_EQ(values[5] & 0x7f, 0x7f);  // and 0 times an infinite scale is NaN, too
}

TEST(Fp8Transpose, MovesEveryByte) {
    constexpr int64_t kRows = 80, kColumns = 144;
    std::vector<uint8_t> x(kRows * kColumns), y(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint8_t>(i * 7 + i / 251);
    const Fp8TransposeParams params{x.data(), y.data(), kRows, kColumns};
    check(params);
    fp8_transpose_cpu(params);
    for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t c = 0; c < kColumns; ++c) {
            ASSERT_EQ(y[c * kRows + r], x[r * kColumns + c]) << r << " " << c;
        }
    }
}

TEST(Fp8Rows, MessagesNameArgumentExpectedAndGot) {
    std::vector<float> x(6), scales(2), columns(2);
    std::vector<uint8_t> values(6);
    try {
        check(Fp8RowsParams{view(x, {2, 3}), view(columns, {2}), view(scales, {2, 1}),
                            values.data()});
        FAIL() << "columns of another size passed";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(),
                     "[lemo:value] fp8_rows: argument 'columns': expected size 3 in dimension 0 "
                     "(the columns of 'x'), got float32 [2] on cpu");
    }
    EXPECT_THROW(check(Fp8TransposeParams{nullptr, nullptr, 16, 24}), Error);
}

}  // namespace
}  // namespace lemo
