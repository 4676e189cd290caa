#include "lemo/rope.h"

#include <gtest/gtest.h>

#include "compare.h"
#include "device_views.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::expect_close;
using testing::expect_same_bits;
using testing::random_values;
using testing::view;
using testing::widen;

template <typename T>
class RopeCuda : public ::testing::Test {};
TYPED_TEST_SUITE(RopeCuda, testing::StorageTypes);

struct Shape {
    int64_t rows, heads, head_size;
};

/// `num_tables` below 0: one for each row, without an index.
template <typename T, typename Table>
void rotates_as_cpu(Shape shape, int64_t num_tables, bool transposed) {
    const auto [rows, heads, head_size] = shape;
    const bool indexed = num_tables >= 0;
    const int64_t tables = indexed ? num_tables : rows;
    const auto x = random_values<T>(rows * heads * head_size, 1);
    const auto cos = random_values<Table>(tables * head_size, 2);
    const auto sin = random_values<Table>(tables * head_size, 3);
    std::vector<int32_t> index(static_cast<size_t>(indexed ? rows : 0));
    for (size_t r = 0; r < index.size(); ++r) index[r] = static_cast<int32_t>(r * 37 % tables);

    auto x_oracle = widen(x), cos_oracle = widen(cos), sin_oracle = widen(sin);
    std::vector<float> y_oracle(x.size());
    rope_cpu({view(x_oracle, {rows, heads, head_size}), view(cos_oracle, {tables, head_size}),
              view(sin_oracle, {tables, head_size}), indexed ? view(index, {rows}) : Tensor{},
              transposed, view(y_oracle, {rows, heads, head_size})});

    const DeviceArray<T> device_x(x), y(x.size()), again(x.size());
    const DeviceArray<Table> device_cos(cos), device_sin(sin);
    const DeviceArray<int32_t> device_index(index);
    RopeParams params{device_x.view({rows, heads, head_size}),
                      device_cos.view({tables, head_size}),
                      device_sin.view({tables, head_size}),
                      indexed ? device_index.view({rows}) : Tensor{},
                      transposed,
                      y.view({rows, heads, head_size})};
    check(params);
    rope_cuda(params, nullptr);
    const auto result = y.download();
    expect_close(
        result, y_oracle,
        std::to_string(rows) + " x " + std::to_string(heads) + " x " + std::to_string(head_size));
    params.y = again.view({rows, heads, head_size});
    rope_cuda(params, nullptr);
    expect_same_bits(again.download(), result);
}

TYPED_TEST(RopeCuda, MatchesCpu) {
    // Head sizes: vectors of 16 bytes, ones that do not divide a warp, odd halves, a half head
    // larger than a warp.
    for (const int64_t head_size : {64, 128, 80, 96, 2, 6, 50, 576, 1024}) {
        for (const bool transposed : {false, true}) {
            rotates_as_cpu<TypeParam, TypeParam>({21, 32, head_size}, 50, transposed);
            rotates_as_cpu<TypeParam, float>({9, 5, head_size}, 7, transposed);
            rotates_as_cpu<TypeParam, TypeParam>({19, 9, head_size}, 40, transposed);
        }
        rotates_as_cpu<TypeParam, TypeParam>({17, 8, head_size}, -1, false);
        rotates_as_cpu<float, TypeParam>({3, 1, head_size}, 4, true);
    }
    rotates_as_cpu<TypeParam, TypeParam>({0, 8, 64}, 5, false);
    rotates_as_cpu<TypeParam, TypeParam>({4, 0, 64}, 5, false);
    rotates_as_cpu<TypeParam, TypeParam>({1, 1, 64}, 1, false);
}

TEST(RopeCuda, TablesOffA16ByteAddress) {
    const int64_t rows = 3, heads = 4, size = 64;
    auto x = random_values<float>(rows * heads * size, 4);
    const auto values = random_values<float>(rows * size + 1, 5);
    auto sin = random_values<float>(rows * size, 6);
    std::vector<float> cos(values.begin() + 1, values.end()), y_oracle(x.size());
    rope_cpu({view(x, {rows, heads, size}), view(cos, {rows, size}), view(sin, {rows, size}),
              Tensor{}, false, view(y_oracle, {rows, heads, size})});
    const DeviceArray<float> device_x(x), device_values(values), device_sin(sin), y(x.size());
    Tensor shifted = device_sin.view({rows, size});
    shifted.data = device_values.data() + 1;
    rope_cuda({device_x.view({rows, heads, size}), shifted, device_sin.view({rows, size}), Tensor{},
               false, y.view({rows, heads, size})},
              nullptr);
    expect_close(y.download(), y_oracle);
}

}  // namespace
}  // namespace lemo
