#include "lemo/fp8_rows.h"

#include <gtest/gtest.h>

#include <cmath>

#include "compare.h"
#include "device_views.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::expect_same_bits;
using testing::random_values;
using testing::view;

template <typename T>
class Fp8RowsCuda : public ::testing::Test {};
TYPED_TEST_SUITE(Fp8RowsCuda, testing::StorageTypes);

template <typename T>
void matches_cpu(std::vector<T> x, int64_t rows, int64_t columns, bool scaled) {
    auto factors = random_values<float>(columns, 2);
    for (float& factor : factors) factor = std::abs(factor) + 1e-3f;
    std::vector<uint8_t> values(x.size());
    std::vector<float> scales(static_cast<size_t>(rows));
    fp8_rows_cpu({view(x, {rows, columns}), scaled ? view(factors, {columns}) : Tensor{},
                  view(scales, {rows, 1}), values.data()});

    const DeviceArray<T> device_x(x);
    const DeviceArray<float> device_factors(factors), device_scales(scales.size());
    const DeviceArray<uint8_t> device_values(values.size());
    const Fp8RowsParams params{device_x.view({rows, columns}),
                               scaled ? device_factors.view({columns}) : Tensor{},
                               device_scales.view({rows, 1}), device_values.data()};
    check(params);
    const std::string what = std::to_string(rows) + " x " + std::to_string(columns);
    for (int repeat = 0; repeat < 2; ++repeat) {
        fp8_rows_cuda(params, nullptr);
        expect_same_bits(device_values.download(), values, what);
        expect_same_bits(device_scales.download(), scales, what);
    }
}

// Every number of vectors that a thread holds, rows that do not fill them, and rows of any length.
TYPED_TEST(Fp8RowsCuda, EveryBitIsTheCpus) {
    for (const auto& [rows, columns] : {std::pair{1, 16},
                                        {7, 576},
                                        {33, 1536},
                                        {5, 2048},
                                        {9, 4096},
                                        {3, 8192},
                                        {3, 14336},
                                        {2, 16384},
                                        {2, 28672},
                                        {4, 341},
                                        {3, 1},
                                        {0, 64}}) {
        const int64_t n = int64_t{rows} * columns;
        matches_cpu(random_values<TypeParam>(n, 1), rows, columns, false);
        matches_cpu(random_values<TypeParam>(n, 3), rows, columns, true);
    }
}

TEST(Fp8RowsCuda, ZerosSmallNumbersAndOutliers) {
    auto x = random_values<float>(4 * 1024, 5);
    for (size_t i = 0; i < 1024; ++i) x[i] = 0;
    for (size_t i = 1024; i < 2048; ++i) x[i] *= 1e-41f;
    x[2100] = 3e5f;
    x[3100] = 1e38f;
    matches_cpu(x, 4, 1024, false);
    matches_cpu(x, 4, 1024, true);
}

TEST(Fp8RowsCuda, WhatIsNotFiniteStaysSo) {
    auto x = random_values<float>(2 * 512, 6);
    x[3] = NAN;
    x[600] = INFINITY;
    const DeviceArray<float> device_x(x), scales(2);
    const DeviceArray<uint8_t> values(x.size());
    fp8_rows_cuda({device_x.view({2, 512}), Tensor{}, scales.view({2, 1}), values.data()}, nullptr);
    const auto found = values.download();
    EXPECT_EQ(found[3] & 0x7f, 0x7f);
    EXPECT_EQ(found[600] & 0x7f, 0x7f);
    EXPECT_TRUE(std::isinf(scales.download()[1]));
}

void moves_every_byte(int64_t rows, int64_t columns) {
    std::vector<uint8_t> x(static_cast<size_t>(rows * columns)), expected(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint8_t>(i * 7 + i / 251);
    fp8_transpose_cpu({x.data(), expected.data(), rows, columns});
    const DeviceArray<uint8_t> device_x(x), y(x.size());
    fp8_transpose_cuda({device_x.data(), y.data(), rows, columns}, nullptr);
    expect_same_bits(y.download(), expected,
                     std::to_string(rows) + " x " + std::to_string(columns));
}

TEST(Fp8TransposeCuda, MovesEveryByte) {
    for (const auto& [rows, columns] :
         {std::pair{16, 16}, {128, 128}, {144, 400}, {1536, 576}, {16, 4096}, {272, 16}}) {
        moves_every_byte(rows, columns);
    }
}

// Tiles of rows, or of columns.
TEST(Fp8TransposeCuda, MoreTilesThanASecondDimensionOfAGrid) {
    moves_every_byte(65537 * 128, 16);
    moves_every_byte(16, 65537 * 128);
}

}  // namespace
}  // namespace lemo
