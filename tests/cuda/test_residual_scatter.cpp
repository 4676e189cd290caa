#include "lemo/residual_scatter.h"

#include <gtest/gtest.h>

#include "compare.h"
#include "device_views.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::expect_close;
using testing::random_rows;
using testing::random_values;
using testing::view;
using testing::widen;

template <typename T>
class ResidualScatterCuda : public ::testing::Test {};
TYPED_TEST_SUITE(ResidualScatterCuda, testing::StorageTypes);

/// `Stream` and `Packed` rows; `kept` below 0: every row, without an index.
template <typename Stream, typename Packed>
void scatter_matches_cpu(int64_t tokens, int64_t hidden, int64_t kept) {
    const bool all = kept < 0;
    const int64_t num_rows = all ? tokens : kept;
    const auto x = random_values<Stream>(tokens * hidden, 1);
    const auto y = random_values<Packed>(num_rows * hidden, 2);
    auto rows = random_rows(tokens, num_rows, 3);

    auto x_oracle = widen(x), y_oracle = widen(y);
    residual_scatter_cpu({view(x_oracle, {tokens, hidden}), view(y_oracle, {num_rows, hidden}),
                          all ? Tensor{} : view(rows, {num_rows})});

    const DeviceArray<Stream> device_x(x);
    const DeviceArray<Packed> device_y(y);
    const DeviceArray<int32_t> device_rows(rows);
    const ResidualScatterParams params{device_x.view({tokens, hidden}),
                                       device_y.view({num_rows, hidden}),
                                       all ? Tensor{} : device_rows.view({num_rows})};
    check(params);
    residual_scatter_cuda(params, nullptr);
    expect_close(device_x.download(), x_oracle,
                 std::to_string(tokens) + " x " + std::to_string(hidden));
}

TYPED_TEST(ResidualScatterCuda, MatchesCpu) {
    for (const int64_t hidden : {1, 7, 8, 384, 4096, 4100}) {
        scatter_matches_cpu<TypeParam, TypeParam>(130, hidden, 61);
        scatter_matches_cpu<TypeParam, TypeParam>(33, hidden, -1);
        scatter_matches_cpu<float, TypeParam>(40, hidden, 40);
    }
    scatter_matches_cpu<TypeParam, TypeParam>(5, 16, 0);
    scatter_matches_cpu<TypeParam, TypeParam>(1, 16, 1);
}

TYPED_TEST(ResidualScatterCuda, GatherCopiesRows) {
    const int64_t tokens = 77, kept = 30;
    for (const int64_t hidden : {1, 24, 1030}) {
        const auto dx = random_values<TypeParam>(tokens * hidden, 4);
        auto rows = random_rows(tokens, kept, 5);
        auto dx_oracle = widen(dx);
        std::vector<float> dy_oracle(static_cast<size_t>(kept * hidden));
        gather_rows_cpu({view(dx_oracle, {tokens, hidden}), view(rows, {kept}),
                         view(dy_oracle, {kept, hidden})});

        const DeviceArray<TypeParam> device_dx(dx), device_dy(dy_oracle.size());
        const DeviceArray<int32_t> device_rows(rows);
        const GatherRowsParams params{device_dx.view({tokens, hidden}), device_rows.view({kept}),
                                      device_dy.view({kept, hidden})};
        check(params);
        gather_rows_cuda(params, nullptr);
        EXPECT_EQ(widen(device_dy.download()), dy_oracle);
    }
}

TEST(ResidualScatterCuda, RowsOffA16ByteAddress) {
    const int64_t tokens = 9, hidden = 8;
    const auto x = random_values<float>(tokens * hidden + 1, 6);
    const auto y = random_values<float>(tokens * hidden, 7);
    const DeviceArray<float> device_x(x), device_y(y);
    Tensor shifted = device_y.view({tokens, hidden});
    shifted.data = device_x.data() + 1;
    residual_scatter_cuda({shifted, device_y.view({tokens, hidden}), Tensor{}}, nullptr);
    auto expected = x;
    for (size_t i = 0; i < y.size(); ++i) expected[i + 1] += y[i];
    EXPECT_EQ(device_x.download(), expected);
}

}  // namespace
}  // namespace lemo
