#include "lemo/predictor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "compare.h"
#include "device_views.h"
#include "lemo/blocks.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::random_values;
using testing::view;
using testing::widen;

struct Shape {
    std::vector<int64_t> seqlens;
    int64_t block, hidden, first, second, outputs;
    bool queries;
};

std::string describe(const Shape& shape) {
    return "blocks of " + std::to_string(shape.block) + ", " + std::to_string(shape.hidden) +
           " -> " + std::to_string(shape.first) + " -> " + std::to_string(shape.second) + " -> " +
           std::to_string(shape.outputs);
}

/// One matrix on both sides; the CPU works on the same values in fp32.
template <typename T>
struct Matrix {
    Matrix(int64_t rows, int64_t columns, float gain, uint32_t seed)
        : rows(rows), columns(columns),
          values(random_values<T>(rows * columns, seed,
                                  1.0f / std::sqrt(static_cast<float>(columns)),
                                  gain / static_cast<float>(columns))),
          wide(widen(values)), device(values), gradient(wide.size()), expected(wide.size()) {}

    int64_t rows, columns;
    std::vector<T> values;
    std::vector<float> wide;
    DeviceArray<T> device;
    DeviceArray<float> gradient;
    std::vector<float> expected;  // gradient

    Tensor host() { return view(wide, {rows, columns}); }
    Tensor host_gradient() { return view(expected, {rows, columns}); }
    Tensor on_device() const { return device.view({rows, columns}); }
    Tensor device_gradient() const { return gradient.view({rows, columns}); }
};

template <typename T>
struct Net {
    Net(int64_t hidden, int64_t first, int64_t second, int64_t outputs, uint32_t seed)
        : down(first, hidden, 0, seed), mid(second, first, 1, seed + 1),
          up(outputs, second, 2, seed + 2) {}

    Matrix<T> down, mid, up;
};

/// The largest relative error of one rounding to T.
template <typename T>
constexpr double kRounding = std::is_same_v<T, cpu::BFloat16> ? 0x1p-8 : 0x1p-11;

/// In fp32 nothing is rounded. Otherwise the activations between maps are, which also moves a share
/// of about one rounding of the units across 0, where their gradient jumps: the norm of that error
/// grows with the root of the share.
template <typename T>
void expect_near(const DeviceArray<float>& got, const std::vector<float>& expected, bool gradient,
                 const std::string& what) {
    double bound = gradient ? 2 * std::sqrt(kRounding<T>) : 2 * kRounding<T>;
    if constexpr (std::is_same_v<T, float>) bound = 2e-5;
    EXPECT_LE(testing::relative_error(got.download(), expected), bound) << what;
}

template <typename T>
void matches_cpu(const Shape& shape) {
    const BlockPlan plan = plan_blocks(shape.seqlens, shape.block);
    const auto blocks = static_cast<int64_t>(plan.block_starts.size()) - 1;
    const auto sequences = static_cast<int64_t>(plan.cu_blocks.size()) - 1;
    const int64_t tokens = plan.block_starts.back();
    const auto x = random_values<T>(tokens * shape.hidden, 1);
    auto wide_x = widen(x);
    auto starts = plan.block_starts, cuts = plan.cu_blocks;
    auto dscores = random_values<float>(blocks, 2, 0.2f, 1.0f);
    Net<T> key(shape.hidden, shape.first, shape.second, shape.outputs, 10);
    Net<T> query(shape.hidden, shape.second, shape.first, shape.outputs, 20);
    const auto host = [](Net<T>& net) {
        return PredictorWeights{net.down.host(), net.mid.host(), net.up.host()};
    };
    const auto device = [](const Net<T>& net) {
        return PredictorWeights{net.down.on_device(), net.mid.on_device(), net.up.on_device()};
    };

    std::vector<float> expected(static_cast<size_t>(blocks));
    PredictorParams cpu{view(wide_x, {tokens, shape.hidden}),
                        host(key),
                        shape.queries ? host(query) : PredictorWeights{},
                        view(starts, {blocks + 1}),
                        view(cuts, {sequences + 1}),
                        view(expected, {blocks}),
                        Tensor{}};
    predictor_cpu(cpu);
    const auto host_gradients = [](Net<T>& net) {
        return PredictorWeights{net.down.host_gradient(), net.mid.host_gradient(),
                                net.up.host_gradient()};
    };
    predictor_backward_cpu({view(dscores, {blocks}), cpu, host_gradients(key),
                            shape.queries ? host_gradients(query) : PredictorWeights{}});

    const DeviceArray<T> device_x(x);
    const DeviceArray<int32_t> device_starts(starts), device_cuts(cuts);
    const DeviceArray<float> scores(expected.size()), device_dscores(dscores);
    PredictorParams params{device_x.view({tokens, shape.hidden}),
                           device(key),
                           shape.queries ? device(query) : PredictorWeights{},
                           device_starts.view({blocks + 1}),
                           device_cuts.view({sequences + 1}),
                           scores.view({blocks})};
    check(params);
    const testing::Scratch scratch(predictor_scratch_bytes(params));
    params.scratch = scratch.data();
    predictor_cuda(params, nullptr);
    const auto first = scores.download();
    expect_near<T>(scores, expected, false, describe(shape));
    predictor_cuda(params, nullptr);
    testing::expect_same_bits(scores.download(), first, describe(shape) + ", again");

    const auto gradients = [](const Net<T>& net) {
        return PredictorWeights{net.down.device_gradient(), net.mid.device_gradient(),
                                net.up.device_gradient()};
    };
    PredictorBackwardParams backward{device_dscores.view({blocks}), params, gradients(key),
                                     shape.queries ? gradients(query) : PredictorWeights{}};
    check(backward);
    const testing::Scratch backward_scratch(predictor_scratch_bytes(backward));
    backward.scratch = backward_scratch.data();
    predictor_backward_cuda(backward, nullptr);
    const auto expect_gradients = [&](Net<T>& net, const std::string& name) {
        for (Matrix<T>* matrix : {&net.down, &net.mid, &net.up}) {
            expect_near<T>(matrix->gradient, matrix->expected, true,
                           describe(shape) + ", gradient of " + name);
        }
    };
    expect_gradients(key, "keys");
    if (shape.queries) expect_gradients(query, "queries");
    const auto ddown = key.down.gradient.download();
    predictor_backward_cuda(backward, nullptr);
    testing::expect_same_bits(key.down.gradient.download(), ddown, describe(shape) + ", again");
}

template <typename T>
class PredictorCuda : public ::testing::Test {};
TYPED_TEST_SUITE(PredictorCuda, testing::StorageTypes);

TYPED_TEST(PredictorCuda, MatchesCpuForEverySizeOfHiddenLayers) {
    for (const auto& [first, second] :
         {std::pair{8, 8}, {40, 24}, {130, 7}, {137, 93}, {256, 200}, {300, 20}}) {
        matches_cpu<TypeParam>({{700, 0, 90}, 64, 96, first, second, 33, true});
        matches_cpu<TypeParam>({{700, 0, 90}, 64, 96, first, second, 1, false});
    }
}

TYPED_TEST(PredictorCuda, MatchesCpuForEveryBlockSize) {
    for (const int64_t block : {1, 5, 48, 128, 200, 1000}) {
        matches_cpu<TypeParam>({{300, 1, 260}, block, 64, 32, 32, 16, true});
    }
}

TYPED_TEST(PredictorCuda, SeveralChunksAndOddHiddenSizes) {
    matches_cpu<TypeParam>({{9000}, 64, 40, 16, 24, 8, true});
    matches_cpu<TypeParam>({{300}, 64, 39, 16, 24, 8, true});
}

TYPED_TEST(PredictorCuda, SmallShapesOfEveryKernel) {
    matches_cpu<TypeParam>({{150, 0, 40}, 48, 40, 16, 24, 8, true});
    matches_cpu<TypeParam>({{140}, 64, 40, 137, 93, 4, true});
    matches_cpu<TypeParam>({{70}, 64, 39, 16, 24, 8, true});
    matches_cpu<TypeParam>({{70}, 64, 40, 16, 24, 1, false});
}

TYPED_TEST(PredictorCuda, NoTokens) {
    matches_cpu<TypeParam>({{0, 0}, 64, 16, 8, 8, 4, true});
    matches_cpu<TypeParam>({{1}, 64, 16, 8, 8, 1, false});
}

}  // namespace
}  // namespace lemo
