#include "lemo/select_norm.h"

#include <gtest/gtest.h>

#include "compare.h"
#include "device_views.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::expect_close;
using testing::expect_same_bits;
using testing::random_rows;
using testing::random_values;
using testing::view;
using testing::widen;

constexpr double kEps = 1e-5;

struct Shape {
    int64_t tokens, hidden, kept;
    std::string_view kind;
};

std::string describe(const Shape& shape) {
    return std::string(shape.kind) + " " + std::to_string(shape.kept) + " of " +
           std::to_string(shape.tokens) + " x " + std::to_string(shape.hidden);
}

/// Inputs on both sides; the CPU works on the same values in fp32.
template <typename T>
struct Data {
    explicit Data(const Shape& shape)
        : shape(shape), layer(shape.kind == "layer"),
          x(random_values<T>(shape.tokens * shape.hidden, 1, 1.0f, 0.5f)),
          weight(random_values<T>(shape.hidden, 2, 0.25f, 1.0f)),
          bias(random_values<T>(shape.hidden, 3)),
          dy(random_values<T>(shape.kept * shape.hidden, 4)),
          dx(random_values<T>(shape.tokens * shape.hidden, 5)),
          rows(random_rows(shape.tokens, shape.kept, 6)) {}

    Shape shape;
    bool layer;
    std::vector<T> x, weight, bias, dy, dx;
    std::vector<int32_t> rows;
};

template <typename T>
void forward_matches_cpu(const Shape& shape) {
    const auto [tokens, hidden, kept, kind] = shape;
    Data<T> data(shape);
    const int64_t num_means = data.layer ? kept : 0;
    auto x = widen(data.x), weight = widen(data.weight), bias = widen(data.bias);
    std::vector<float> y(kept * hidden), x_rows(y), mean(num_means), rstd(kept);
    select_norm_cpu({view(x, {tokens, hidden}), view(data.rows, {kept}), view(weight, {hidden}),
                     data.layer ? view(bias, {hidden}) : Tensor{}, kEps, kind,
                     view(y, {kept, hidden}), view(x_rows, {kept, hidden}), view(mean, {num_means}),
                     view(rstd, {kept})});

    const DeviceArray<T> device_x(data.x), device_weight(data.weight), device_bias(data.bias);
    const DeviceArray<int32_t> device_rows(data.rows);
    const DeviceArray<T> device_y(y.size()), device_x_rows(y.size());
    const DeviceArray<float> device_mean(mean.size()), device_rstd(rstd.size());
    const SelectNormParams params{device_x.view({tokens, hidden}),
                                  device_rows.view({kept}),
                                  device_weight.view({hidden}),
                                  data.layer ? device_bias.view({hidden}) : Tensor{},
                                  kEps,
                                  kind,
                                  device_y.view({kept, hidden}),
                                  device_x_rows.view({kept, hidden}),
                                  device_mean.view({num_means}),
                                  device_rstd.view({kept})};
    check(params);
    select_norm_cuda(params, nullptr);
    expect_close(device_y.download(), y, describe(shape) + ": y");
    EXPECT_EQ(widen(device_x_rows.download()), x_rows) << describe(shape);
    expect_close(device_mean.download(), mean, describe(shape) + ": mean");
    expect_close(device_rstd.download(), rstd, describe(shape) + ": rstd");
}

template <typename T>
void backward_matches_cpu(const Shape& shape) {
    const auto [tokens, hidden, kept, kind] = shape;
    Data<T> data(shape);
    const int64_t num_means = data.layer ? kept : 0;
    const auto x_rows = random_values<T>(kept * hidden, 7);
    const auto rstd = random_values<float>(kept, 8, 0.1f, 1.0f);
    const auto mean = random_values<float>(num_means, 9, 0.1f);

    auto dy_oracle = widen(data.dy), x_oracle = widen(x_rows), weight = widen(data.weight);
    auto dx_oracle = widen(data.dx), rstd_oracle = rstd, mean_oracle = mean;
    std::vector<float> dweight(hidden), dbias(data.layer ? hidden : 0);
    select_norm_backward_cpu({view(dy_oracle, {kept, hidden}), view(x_oracle, {kept, hidden}),
                              view(data.rows, {kept}), view(weight, {hidden}),
                              view(mean_oracle, {num_means}), view(rstd_oracle, {kept}), kind,
                              view(dx_oracle, {tokens, hidden}), view(dweight, {hidden}),
                              data.layer ? view(dbias, {hidden}) : Tensor{}});

    const DeviceArray<T> device_dy(data.dy), device_x(x_rows), device_weight(data.weight);
    const DeviceArray<int32_t> device_rows(data.rows);
    const DeviceArray<float> device_mean(mean), device_rstd(rstd);
    const DeviceArray<float> device_dweight(dweight.size()), device_dbias(dbias.size());
    DeviceArray<T> device_dx(data.dx);
    const SelectNormBackwardParams params{device_dy.view({kept, hidden}),
                                          device_x.view({kept, hidden}),
                                          device_rows.view({kept}),
                                          device_weight.view({hidden}),
                                          device_mean.view({num_means}),
                                          device_rstd.view({kept}),
                                          kind,
                                          device_dx.view({tokens, hidden}),
                                          device_dweight.view({hidden}),
                                          data.layer ? device_dbias.view({hidden}) : Tensor{}};
    check(params);
    select_norm_backward_cuda(params, nullptr);
    const auto dx = device_dx.download();
    expect_close(dx, dx_oracle, describe(shape) + ": dx");
    expect_close(device_dweight.download(), dweight, describe(shape) + ": dweight");
    if (data.layer) expect_close(device_dbias.download(), dbias, describe(shape) + ": dbias");

    const auto first_dweight = device_dweight.download();
    for (int repeat = 0; repeat < 10; ++repeat) {
        device_dx.upload(data.dx);
        select_norm_backward_cuda(params, nullptr);
        expect_same_bits(device_dx.download(), dx, "dx again");
        expect_same_bits(device_dweight.download(), first_dweight, "dweight again");
    }
}

template <typename T>
class SelectNormCuda : public ::testing::Test {};
TYPED_TEST_SUITE(SelectNormCuda, testing::StorageTypes);

TYPED_TEST(SelectNormCuda, ForwardMatchesCpu) {
    for (const std::string_view kind : {"rms", "layer"}) {
        for (const int64_t hidden : {8, 24, 70, 384, 512, 576, 1024, 1032, 4096, 4104, 8192}) {
            forward_matches_cpu<TypeParam>({90, hidden, 41, kind});
        }
        forward_matches_cpu<TypeParam>({3, 16, 3, kind});
        forward_matches_cpu<TypeParam>({3, 16, 0, kind});
    }
}

TYPED_TEST(SelectNormCuda, BackwardMatchesCpuAndRepeats) {
    for (const std::string_view kind : {"rms", "layer"}) {
        for (const int64_t hidden : {8, 24, 70, 384, 512, 576, 1024, 1032, 4096, 4104}) {
            backward_matches_cpu<TypeParam>({90, hidden, 41, kind});
        }
        backward_matches_cpu<TypeParam>({3, 16, 0, kind});
    }
}

TEST(SelectNormCuda, EveryRowWithoutAnIndexAndFp32Weights) {
    const int64_t tokens = 20, hidden = 136;
    const auto x = random_values<cpu::BFloat16>(tokens * hidden, 1);
    auto weight = random_values<float>(hidden, 2);
    auto wide = widen(x);
    std::vector<float> y(wide.size()), mean, rstd(tokens);
    select_norm_cpu({view(wide, {tokens, hidden}), Tensor{}, view(weight, {hidden}), Tensor{}, kEps,
                     "rms", view(y, {tokens, hidden}), Tensor{}, view(mean, {0}),
                     view(rstd, {tokens})});
    const DeviceArray<cpu::BFloat16> device_x(x), device_y(y.size());
    const DeviceArray<float> device_weight(weight), device_mean(0), device_rstd(rstd.size());
    select_norm_cuda({device_x.view({tokens, hidden}), Tensor{}, device_weight.view({hidden}),
                      Tensor{}, kEps, "rms", device_y.view({tokens, hidden}), Tensor{},
                      device_mean.view({0}), device_rstd.view({tokens})},
                     nullptr);
    expect_close(device_y.download(), y);
}

TEST(SelectNormCuda, ARowLongerThanSharedMemoryIsRefused) {
    const int64_t hidden = 128 * 1024;
    const DeviceArray<float> x(hidden), weight(hidden), y(hidden), mean(0), rstd(1);
    const SelectNormParams params{
        x.view({1, hidden}), Tensor{}, weight.view({hidden}), Tensor{},      kEps, "rms",
        y.view({1, hidden}), Tensor{}, mean.view({0}),        rstd.view({1})};
    try {
        select_norm_cuda(params, nullptr);
        FAIL() << "a row of 512 KiB passed";
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kUnsupported);
    }
    // The failed attribute must not surface as the error of a later launch.
    forward_matches_cpu<float>({3, 16, 3, "rms"});
}

}  // namespace
}  // namespace lemo
