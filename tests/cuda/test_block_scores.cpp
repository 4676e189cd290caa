#include "lemo/block_scores.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "compare.h"
#include "device_views.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::random_values;
using testing::view;
using testing::widen;

struct Shape {
    std::vector<int64_t> seqlens;
    int64_t block, heads, key_heads, head_dim;
};

std::string describe(const Shape& shape) {
    return std::to_string(shape.seqlens.size()) + " sequence(s), blocks of " +
           std::to_string(shape.block) + ", " + std::to_string(shape.heads) + "/" +
           std::to_string(shape.key_heads) + " heads of " + std::to_string(shape.head_dim);
}

/// The kernels that this GPU runs.
std::vector<const char*> kernels() {
    std::vector<const char*> list{"portable"};
    cudaDeviceProp properties;
    testing::require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    if (properties.major == 9 && properties.minor == 0) list.push_back("hopper");
    return list;
}

/// The inputs are exact in fp32 and every sum is fp32, so the result is as close as an fp32 one.
template <typename T>
void matches_cpu(const Shape& shape) {
    const BlockPlan plan = plan_blocks(shape.seqlens, shape.block);
    const auto blocks = static_cast<int64_t>(plan.block_starts.size()) - 1;
    const auto sequences = static_cast<int64_t>(plan.cu_blocks.size()) - 1;
    const int64_t tokens = plan.block_starts.back();
    const auto q = random_values<T>(tokens * shape.heads * shape.head_dim, 1);
    const auto k = random_values<T>(tokens * shape.key_heads * shape.head_dim, 2);
    auto wide_q = widen(q), wide_k = widen(k);
    auto starts = plan.block_starts, cuts = plan.cu_blocks;
    std::vector<float> expected(static_cast<size_t>(blocks));
    block_scores_cpu({view(wide_q, {tokens, shape.heads, shape.head_dim}),
                      view(wide_k, {tokens, shape.key_heads, shape.head_dim}),
                      view(starts, {blocks + 1}), view(cuts, {sequences + 1}), 0.3,
                      view(expected, {blocks})});

    const DeviceArray<T> device_q(q), device_k(k);
    const DeviceArray<int32_t> device_starts(starts), device_cuts(cuts);
    const DeviceArray<float> scores(expected.size());
    for (const char* kernel : kernels()) {
        BlockScoresParams params{device_q.view({tokens, shape.heads, shape.head_dim}),
                                 device_k.view({tokens, shape.key_heads, shape.head_dim}),
                                 device_starts.view({blocks + 1}),
                                 device_cuts.view({sequences + 1}),
                                 0.3,
                                 scores.view({blocks}),
                                 nullptr,
                                 kernel};
        const testing::Scratch scratch(block_scores_scratch_bytes(params));
        params.scratch = scratch.data();
        const std::string what = describe(shape) + ", " + kernel;
        check(params);
        block_scores_cuda(params, nullptr);
        const auto first = scores.download();
        testing::expect_close(first, expected, what);
        for (int repeat = 0; repeat < 5; ++repeat) {
            block_scores_cuda(params, nullptr);
            testing::expect_same_bits(scores.download(), first, what + ", again");
        }
    }
}

template <typename T>
class BlockScoresCuda : public ::testing::Test {};
TYPED_TEST_SUITE(BlockScoresCuda, testing::LowPrecisionTypes);

TYPED_TEST(BlockScoresCuda, MatchesCpuForEveryHeadSize) {
    for (const int64_t head_dim : {8, 40, 64, 72, 128}) {
        matches_cpu<TypeParam>({{700, 0, 1, 290}, 64, 4, 2, head_dim});
    }
}

TYPED_TEST(BlockScoresCuda, MatchesCpuForEveryBlockSize) {
    for (const int64_t block : {1, 3, 8, 16, 48, 64, 100, 128, 200, 256, 300, 1000}) {
        matches_cpu<TypeParam>({{520, 300}, block, 2, 1, 64});
    }
}

TYPED_TEST(BlockScoresCuda, MatchesCpuForGroupsOfHeads) {
    matches_cpu<TypeParam>({{400}, 64, 7, 1, 128});
    matches_cpu<TypeParam>({{400}, 64, 4, 4, 128});
    matches_cpu<TypeParam>({{400}, 64, 24, 2, 128});
}

TYPED_TEST(BlockScoresCuda, SmallShapes) {
    matches_cpu<TypeParam>({{150, 0, 70}, 48, 3, 1, 64});
    matches_cpu<TypeParam>({{140}, 64, 2, 2, 128});
    matches_cpu<TypeParam>({{310}, 300, 2, 1, 72});
}

TYPED_TEST(BlockScoresCuda, ManySequencesAndNone) {
    matches_cpu<TypeParam>({std::vector<int64_t>(300, 7), 4, 2, 1, 16});
    matches_cpu<TypeParam>({{1}, 64, 1, 1, 8});
    matches_cpu<TypeParam>({{0, 0}, 64, 1, 1, 8});
}

TYPED_TEST(BlockScoresCuda, MatchesCpuWhereRingsGoRound) {
    matches_cpu<TypeParam>({{2100, 5, 900}, 64, 6, 2, 128});
    matches_cpu<TypeParam>({{2100, 5, 900}, 40, 4, 4, 64});
}

TEST(BlockScoresCuda, UnknownKernelsAreNamed) {
    const DeviceArray<cpu::BFloat16> q(8);
    const DeviceArray<float> scores(1);
    const DeviceArray<int32_t> starts({0, 1}), cuts({0, 1});
    try {
        block_scores_cuda({q.view({1, 1, 8}), q.view({1, 1, 8}), starts.view({2}), cuts.view({2}),
                           1.0, scores.view({1}), nullptr, "fast"},
                          nullptr);
        FAIL() << "'fast' passed";
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kValue);
    }
}

TEST(BlockScoresCuda, UnsupportedInputsAreNamed) {
    const DeviceArray<float> q(12), scores(1);
    const DeviceArray<int32_t> starts({0, 1}), cuts({0, 1});
    try {
        block_scores_cuda({q.view({1, 1, 12}), q.view({1, 1, 12}), starts.view({2}), cuts.view({2}),
                           1.0, scores.view({1})},
                          nullptr);
        FAIL() << "float32 passed";
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kUnsupported);
    }
}

}  // namespace
}  // namespace lemo
