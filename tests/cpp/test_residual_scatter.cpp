#include "lemo/residual_scatter.h"

#include <gtest/gtest.h>

#include "lemo/check.h"
#include "views.h"

namespace lemo {
namespace {

using testing::view;

TEST(ResidualScatter, AddsPackedRowsToTheirStreamRows) {
    std::vector<float> x{1, 2, 3, 4, 5, 6};
    std::vector<float> y{10, 20, 30, 40};
    std::vector<int32_t> rows{0, 2};
    const ResidualScatterParams params{view(x, {3, 2}), view(y, {2, 2}), view(rows, {2})};
    check(params);
    residual_scatter_cpu(params);
    EXPECT_EQ(x, (std::vector<float>{11, 22, 3, 4, 35, 46}));
}

TEST(ResidualScatter, GatherIsItsAdjoint) {
    std::vector<float> dx{1, 2, 3, 4, 5, 6};
    std::vector<int32_t> rows{1};
    std::vector<float> dy(2);
    const GatherRowsParams params{view(dx, {3, 2}), view(rows, {1}), view(dy, {1, 2})};
    check(params);
    gather_rows_cpu(params);
    EXPECT_EQ(dy, (std::vector<float>{3, 4}));
}

TEST(ResidualScatter, RefusesMemoryThatOverlaps) {
    std::vector<float> x(8);
    const Tensor stream = view(x, {3, 2});
    Tensor packed = view(x, {2, 2});
    for (const int offset : {0, 1, 5}) {
        packed.data = x.data() + offset;
        EXPECT_THROW(check(ResidualScatterParams{stream, packed, Tensor{}}), Error) << offset;
    }
    Tensor behind = view(x, {1, 2});
    behind.data = x.data() + 6;
    std::vector<int32_t> rows{1};
    EXPECT_NO_THROW(check(ResidualScatterParams{stream, behind, view(rows, {1})}));
}

TEST(ResidualScatter, MessageNamesArgumentExpectedAndGot) {
    std::vector<float> x(6), y(4);
    std::vector<int32_t> rows{2, 1};
    try {
        check(ResidualScatterParams{view(x, {3, 2}), view(y, {2, 2}), view(rows, {2})});
        FAIL() << "descending rows passed";
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kValue);
        EXPECT_STREQ(error.what(),
                     "[lemo:value] residual_scatter: argument 'rows': expected strictly ascending "
                     "rows below 3, got 1 after 2 at index 1");
    }
}

}  // namespace
}  // namespace lemo
