#include "lemo/linear_cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <string>

#include "compare.h"
#include "device_views.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::expect_close;
using testing::expect_same_bits;
using testing::random_values;
using testing::relative_error;
using testing::view;
using testing::widen;

constexpr int64_t kIgnored = -100;

struct Shape {
    int64_t rows, hidden, vocabulary, chunk_rows;
    bool bias = true;
    bool hidden_grad = true;
    bool weight_grad = true;
};

std::string describe(const Shape& s) {
    return std::to_string(s.rows) + " x " + std::to_string(s.vocabulary) + " x " +
           std::to_string(s.hidden) + " in segments of " + std::to_string(s.chunk_rows);
}

/// Every third label is ignored, and the hidden states of those rows are NaN.
template <typename T, typename B>
struct Data {
    explicit Data(const Shape& shape)
        : hidden(random_values<T>(shape.rows * shape.hidden, 1)),
          weight(random_values<T>(shape.vocabulary * shape.hidden, 2,
                                  1.0f / std::sqrt(static_cast<float>(shape.hidden)))),
          bias(random_values<B>(shape.vocabulary, 3)), labels(static_cast<size_t>(shape.rows)) {
        for (int64_t r = 0; r < shape.rows; ++r) {
            const bool last_word = r % 5 == 1;
            const int64_t word = last_word ? shape.vocabulary - 1 : r * 7919 % shape.vocabulary;
            labels[static_cast<size_t>(r)] = r % 3 == 2 ? kIgnored : word;
            if (r % 3 != 2) continue;
            for (int64_t i = 0; i < shape.hidden; ++i) {
                cpu::store(&hidden[static_cast<size_t>(r * shape.hidden + i)], NAN);
            }
        }
    }

    std::vector<T> hidden, weight;
    std::vector<B> bias;
    std::vector<int64_t> labels;
};

/// A result that was not asked for is empty.
template <typename T, typename B>
struct Results {
    explicit Results(const Shape& s)
        : loss(1), count(1), dhidden(static_cast<size_t>(s.hidden_grad ? s.rows * s.hidden : 0)),
          dweight(static_cast<size_t>(s.weight_grad ? s.vocabulary * s.hidden : 0)),
          dbias(static_cast<size_t>(s.weight_grad && s.bias ? s.vocabulary : 0)) {}

    std::vector<float> loss;
    std::vector<int64_t> count;
    std::vector<T> dhidden, dweight;
    std::vector<B> dbias;
};

template <typename T, typename B>
Results<float, float> run_on_cpu(const Shape& s, const Data<T, B>& data) {
    auto hidden = widen(data.hidden), weight = widen(data.weight), bias = widen(data.bias);
    auto labels = data.labels;
    Results<float, float> results(s);
    LinearCrossEntropyParams params;
    params.hidden = view(hidden, {s.rows, s.hidden});
    params.weight = view(weight, {s.vocabulary, s.hidden});
    if (s.bias) params.bias = view(bias, {s.vocabulary});
    params.labels = view(labels, {s.rows});
    params.chunk_rows = s.chunk_rows;
    params.loss = view(results.loss, {});
    params.count = view(results.count, {});
    if (s.hidden_grad) params.dhidden = view(results.dhidden, {s.rows, s.hidden});
    if (s.weight_grad) params.dweight = view(results.dweight, {s.vocabulary, s.hidden});
    if (s.weight_grad && s.bias) params.dbias = view(results.dbias, {s.vocabulary});
    linear_cross_entropy_cpu(params);
    return results;
}

template <typename T, typename B>
class OnGpu {
public:
    OnGpu(const Shape& s, const Data<T, B>& data)
        : shape_(s), hidden_(data.hidden), weight_(data.weight), bias_(data.bias),
          labels_(data.labels), loss_(1), count_(1), dhidden_(Results<T, B>(s).dhidden.size()),
          dweight_(Results<T, B>(s).dweight.size()), dbias_(Results<T, B>(s).dbias.size()) {
        params_.hidden = hidden_.view({s.rows, s.hidden});
        params_.weight = weight_.view({s.vocabulary, s.hidden});
        if (s.bias) params_.bias = bias_.view({s.vocabulary});
        params_.labels = labels_.view({s.rows});
        params_.chunk_rows = s.chunk_rows;
        params_.loss = loss_.view({});
        params_.count = count_.view({});
        if (s.hidden_grad) params_.dhidden = dhidden_.view({s.rows, s.hidden});
        if (s.weight_grad) params_.dweight = dweight_.view({s.vocabulary, s.hidden});
        if (s.weight_grad && s.bias) params_.dbias = dbias_.view({s.vocabulary});
        check(params_);
        scratch_.emplace(linear_cross_entropy_scratch_bytes(params_));
        params_.scratch = scratch_->data();
    }

    Results<T, B> run() {
        linear_cross_entropy_cuda(params_, nullptr);
        Results<T, B> results(shape_);
        results.loss = loss_.download();
        results.count = count_.download();
        results.dhidden = dhidden_.download();
        results.dweight = dweight_.download();
        results.dbias = dbias_.download();
        return results;
    }

private:
    Shape shape_;
    DeviceArray<T> hidden_, weight_;
    DeviceArray<B> bias_;
    DeviceArray<int64_t> labels_;
    DeviceArray<float> loss_;
    DeviceArray<int64_t> count_;
    DeviceArray<T> dhidden_, dweight_;
    DeviceArray<B> dbias_;
    std::optional<testing::Scratch> scratch_;
    LinearCrossEntropyParams params_;
};

template <typename T, typename B = T>
void matches_cpu(const Shape& shape) {
    const Data<T, B> data(shape);
    const auto expected = run_on_cpu(shape, data);
    const auto results = OnGpu<T, B>(shape, data).run();
    const std::string what = describe(shape);
    // Logits, their gradients and the result are rounded to T.
    constexpr int kRoundings = std::is_same_v<T, float> ? 1 : 3;
    EXPECT_EQ(results.count, expected.count) << what;
    // The loss is fp32 whatever T is, but logits are rounded to T.
    const double bound = sizeof(T) == 4 ? 2e-5 : std::is_same_v<T, cpu::Float16> ? 0x1p-11 : 0x1p-8;
    EXPECT_LE(relative_error(results.loss, expected.loss), bound) << what;
    expect_close(results.dhidden, expected.dhidden, what + ": dhidden", kRoundings);
    expect_close(results.dweight, expected.dweight, what + ": dweight", kRoundings);
    if constexpr (std::is_same_v<T, B>) {
        expect_close(results.dbias, expected.dbias, what + ": dbias", kRoundings);
    } else {
        EXPECT_LE(relative_error(results.dbias, expected.dbias), 0x1p-7) << what;
    }
}

template <typename T>
class LinearCrossEntropyCuda : public ::testing::Test {};
TYPED_TEST_SUITE(LinearCrossEntropyCuda, testing::StorageTypes);

TYPED_TEST(LinearCrossEntropyCuda, MatchesCpu) {
    // Rows in registers alone, with shared memory, and too long for both; even and ragged ends.
    for (const int64_t vocabulary : {2, 11, 128, 9000, 40001}) {
        matches_cpu<TypeParam>({17, 24, vocabulary, 6});
    }
    matches_cpu<TypeParam>({5, 8, 262147, 2});
    matches_cpu<TypeParam>({300, 136, 1100, 128});
    matches_cpu<TypeParam>({1, 1, 3, 1});
}

TYPED_TEST(LinearCrossEntropyCuda, ComputesWhatIsAskedFor) {
    const Shape all{17, 24, 40001, 6};
    Shape shape = all;
    shape.bias = false;
    matches_cpu<TypeParam>(shape);
    shape = all;
    shape.weight_grad = false;
    matches_cpu<TypeParam>(shape);
    shape = all;
    shape.hidden_grad = false;
    matches_cpu<TypeParam>(shape);
    shape.weight_grad = false;
    matches_cpu<TypeParam>(shape);
    matches_cpu<TypeParam>({17, 24, 1000, 100});
    matches_cpu<TypeParam>({0, 24, 1000, 100});
}

TYPED_TEST(LinearCrossEntropyCuda, BiasOfAnotherDtype) {
    matches_cpu<TypeParam, cpu::BFloat16>({17, 24, 1001, 6});
    matches_cpu<TypeParam, float>({17, 24, 1001, 6});
}

TYPED_TEST(LinearCrossEntropyCuda, AHundredRepeatsAreBitEqual) {
    const Shape shape{70, 64, 5003, 32};
    const Data<TypeParam, float> data(shape);
    OnGpu<TypeParam, float> gpu(shape, data);
    const auto first = gpu.run();
    for (int repeat = 0; repeat < 100; ++repeat) {
        const auto again = gpu.run();
        expect_same_bits(again.loss, first.loss, "loss");
        expect_same_bits(again.dhidden, first.dhidden, "dhidden");
        expect_same_bits(again.dweight, first.dweight, "dweight");
        expect_same_bits(again.dbias, first.dbias, "dbias");
    }
}

TEST(LinearCrossEntropyCuda, ALabelThatIsNoWordMakesTheLossNan) {
    const Shape shape{4, 8, 100, 4};
    for (const int64_t label : {int64_t{-1}, int64_t{100}, int64_t{1} << 40}) {
        Data<float, float> data(shape);
        data.labels = {3, label, kIgnored, 5};
        const auto results = OnGpu<float, float>(shape, data).run();
        EXPECT_TRUE(std::isnan(results.loss[0])) << label;
        EXPECT_EQ(results.count[0], 3) << label;
        for (int64_t i = 0; i < shape.hidden; ++i) {
            EXPECT_TRUE(std::isfinite(results.dhidden[static_cast<size_t>(i)]));
            EXPECT_TRUE(std::isnan(results.dhidden[static_cast<size_t>(shape.hidden + i)]));
        }
    }
}

TEST(LinearCrossEntropyCuda, MessageSaysWhatIsSupported) {
    const DeviceArray<float> hidden(12), loss(1);
    const DeviceArray<cpu::BFloat16> weight(20);
    const DeviceArray<int64_t> labels(3), count(1);
    LinearCrossEntropyParams params;
    params.hidden = hidden.view({3, 4});
    params.weight = weight.view({5, 4});
    params.labels = labels.view({3});
    params.loss = loss.view({});
    params.count = count.view({});
    check(params);
    try {
        linear_cross_entropy_scratch_bytes(params);
        FAIL() << "a weight of another dtype passed";
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kUnsupported);
        EXPECT_STREQ(error.what(),
                     "[lemo:unsupported] linear_cross_entropy: argument 'weight': expected the "
                     "dtype of 'hidden' (float32) on cuda, where the product is cuBLAS's, got "
                     "bfloat16");
    }
}

}  // namespace
}  // namespace lemo
