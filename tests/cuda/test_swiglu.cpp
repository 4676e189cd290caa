#include "lemo/swiglu.h"

#include <gtest/gtest.h>

#include "compare.h"
#include "device_views.h"
#include "fp8.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::expect_close;
using testing::expect_same_bits;
using testing::random_values;
using testing::view;
using testing::widen;

// Gates far enough from 0 that both ends of the sigmoid take part.
constexpr float kGateScale = 6;

template <typename T>
class SwigluCuda : public ::testing::Test {};
TYPED_TEST_SUITE(SwigluCuda, testing::StorageTypes);

template <typename T>
void forward_matches_cpu(int64_t rows, int64_t columns) {
    const int64_t n = rows * columns;
    const auto gate = random_values<T>(n, 1, kGateScale), up = random_values<T>(n, 2);
    auto gate_oracle = widen(gate), up_oracle = widen(up);
    std::vector<float> y_oracle(gate.size());
    swiglu_cpu({view(gate_oracle, {rows, columns}), view(up_oracle, {rows, columns}),
                view(y_oracle, {rows, columns})});

    const DeviceArray<T> device_gate(gate), device_up(up), y(gate.size());
    const SwigluParams params{device_gate.view({rows, columns}), device_up.view({rows, columns}),
                              y.view({rows, columns})};
    check(params);
    swiglu_cuda(params, nullptr);
    expect_close(y.download(), y_oracle, std::to_string(rows) + " x " + std::to_string(columns));
}

template <typename T>
void backward_matches_cpu(int64_t rows, int64_t columns) {
    const int64_t n = rows * columns;
    const auto gate = random_values<T>(n, 1, kGateScale), up = random_values<T>(n, 2);
    const auto dout = random_values<T>(n, 3);
    auto gate_oracle = widen(gate), up_oracle = widen(up), dout_oracle = widen(dout);
    swiglu_backward_cpu({view(dout_oracle, {rows, columns}), view(gate_oracle, {rows, columns}),
                         view(up_oracle, {rows, columns})});

    const DeviceArray<T> device_dout(dout);
    DeviceArray<T> device_gate(gate), device_up(up);
    const SwigluBackwardParams params{device_dout.view({rows, columns}),
                                      device_gate.view({rows, columns}),
                                      device_up.view({rows, columns})};
    check(params);
    swiglu_backward_cuda(params, nullptr);
    const auto dgate = device_gate.download(), dup = device_up.download();
    expect_close(dgate, gate_oracle, "dgate " + std::to_string(n));
    expect_close(dup, up_oracle, "dup " + std::to_string(n));

    device_gate.upload(gate);
    device_up.upload(up);
    swiglu_backward_cuda(params, nullptr);
    expect_same_bits(device_gate.download(), dgate);
    expect_same_bits(device_up.download(), dup);
}

TYPED_TEST(SwigluCuda, MatchesCpu) {
    for (const auto& [rows, columns] :
         {std::pair{1, 1}, {1, 7}, {3, 8}, {13, 341}, {64, 14336}, {5, 0}, {0, 5}, {1, 4097}}) {
        forward_matches_cpu<TypeParam>(rows, columns);
        backward_matches_cpu<TypeParam>(rows, columns);
    }
}

// The same bits as on the CPU, whose e4m3 is that of y as it is stored: the GPU's y, here.
TYPED_TEST(SwigluCuda, ResultIn8Bits) {
    for (const auto& [rows, columns] :
         {std::pair{3, 8}, {13, 341}, {64, 14336}, {5, 4096}, {7, 1536}, {2, 20000}, {0, 16}}) {
        const int64_t n = int64_t{rows} * columns;
        const auto gate = random_values<TypeParam>(n, 1, kGateScale);
        const auto up = random_values<TypeParam>(n, 2);
        const DeviceArray<TypeParam> device_gate(gate), device_up(up), y(gate.size());
        const DeviceArray<TypeParam> plain(gate.size());
        const DeviceArray<uint8_t> values(gate.size());
        const DeviceArray<float> scales(static_cast<size_t>(rows));
        const SwigluFp8Params params{{device_gate.view({rows, columns}),
                                      device_up.view({rows, columns}), y.view({rows, columns})},
                                     scales.view({rows, 1}),
                                     values.data()};
        check(params);
        swiglu_fp8_cuda(params, nullptr);
        swiglu_cuda({params.product.gate, params.product.up, plain.view({rows, columns})}, nullptr);
        const auto found = y.download();
        expect_same_bits(found, plain.download());
        std::vector<uint8_t> expected(gate.size());
        std::vector<float> expected_scales(static_cast<size_t>(rows));
        for (int64_t r = 0; r < rows; ++r) {
            expected_scales[r] = cpu::quantise_row(found.data() + r * columns, nullptr, columns,
                                                   expected.data() + r * columns);
        }
        expect_same_bits(values.download(), expected);
        expect_same_bits(scales.download(), expected_scales);
    }
}

TEST(SwigluCuda, ArraysOffA16ByteAddress) {
    const int64_t n = 1030;
    const auto values = random_values<float>(n + 1, 4, kGateScale);
    const auto up = random_values<float>(n, 5);
    std::vector<float> gate_oracle(values.begin() + 1, values.end()), up_oracle(up), y_oracle(up);
    swiglu_cpu({view(gate_oracle, {1, n}), view(up_oracle, {1, n}), view(y_oracle, {1, n})});
    const DeviceArray<float> device_values(values), device_up(up), y(up.size());
    Tensor gate = y.view({1, n});
    gate.data = device_values.data() + 1;
    swiglu_cuda({gate, device_up.view({1, n}), y.view({1, n})}, nullptr);
    expect_close(y.download(), y_oracle);
}

TEST(SwigluCuda, EndsOfTheNumberRange) {
    std::vector<float> gate{-3e38f, -1e4f, -100, -88, 0, 88, 1e4f, 3e38f, NAN};
    std::vector<float> up(9, 1.0f), y_oracle(9);
    swiglu_cpu({view(gate, {1, 9}), view(up, {1, 9}), view(y_oracle, {1, 9})});
    const DeviceArray<float> device_gate(gate), device_up(up), y(9);
    swiglu_cuda({device_gate.view({1, 9}), device_up.view({1, 9}), y.view({1, 9})}, nullptr);
    const auto result = y.download();
    for (size_t i = 0; i < 8; ++i) {
        EXPECT_NEAR(result[i], y_oracle[i], 1e-6f * std::abs(y_oracle[i]) + 1e-30f) << i;
    }
    EXPECT_TRUE(std::isnan(result[8]));
}

}  // namespace
}  // namespace lemo
