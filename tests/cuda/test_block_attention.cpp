#include "lemo/block_attention.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "compare.h"
#include "device_views.h"
#include "lemo/blocks.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::random_values;
using testing::view;
using testing::widen;

struct Shape {
    std::vector<int64_t> seqlens;
    int64_t block, num_rows, heads, key_heads, head_dim;
};

std::string describe(const Shape& shape) {
    return std::to_string(shape.seqlens.size()) + " sequence(s), blocks of " +
           std::to_string(shape.block) + ", " + std::to_string(shape.num_rows) + " rows, " +
           std::to_string(shape.heads) + "/" + std::to_string(shape.key_heads) + " heads of " +
           std::to_string(shape.head_dim);
}

/// Tokens in any order, some of them several times.
template <typename Index>
std::vector<Index> some_rows(int64_t tokens, int64_t num_rows) {
    std::mt19937 generator(3);
    std::uniform_int_distribution<int64_t> any(0, tokens - 1);
    std::vector<Index> rows(static_cast<size_t>(tokens > 0 ? num_rows : 0));
    for (Index& row : rows) row = static_cast<Index>(any(generator));
    return rows;
}

/// The inputs are exact in fp32 and every sum is fp32, so the results are as close as fp32 ones.
template <typename T, typename Index = int32_t>
void matches_cpu(const Shape& shape) {
    const BlockPlan plan = plan_blocks(shape.seqlens, shape.block);
    const auto blocks = static_cast<int64_t>(plan.block_starts.size()) - 1;
    const auto sequences = static_cast<int64_t>(plan.cu_blocks.size()) - 1;
    const int64_t tokens = plan.block_starts.back();
    auto rows = some_rows<Index>(tokens, shape.num_rows);
    const auto num_rows = static_cast<int64_t>(rows.size());
    const std::vector<int64_t> q_shape{num_rows, shape.heads, shape.head_dim};
    const std::vector<int64_t> k_shape{tokens, shape.key_heads, shape.head_dim};
    const std::vector<int64_t> result_shape{num_rows, shape.heads, blocks};
    const auto q = random_values<T>(num_rows * shape.heads * shape.head_dim, 1);
    const auto k = random_values<T>(tokens * shape.key_heads * shape.head_dim, 2);
    auto wide_q = widen(q), wide_k = widen(k);
    auto starts = plan.block_starts, cuts = plan.cu_blocks;
    std::vector<float> expected_maximum(static_cast<size_t>(num_rows * shape.heads * blocks));
    std::vector<float> expected_logsumexp(expected_maximum.size());
    block_attention_cpu({view(wide_q, q_shape), view(wide_k, k_shape), view(rows, {num_rows}),
                         view(starts, {blocks + 1}), view(cuts, {sequences + 1}), 0.3,
                         view(expected_maximum, result_shape),
                         view(expected_logsumexp, result_shape)});

    const DeviceArray<T> device_q(q), device_k(k);
    const DeviceArray<Index> device_rows(rows);
    const DeviceArray<int32_t> device_starts(starts), device_cuts(cuts);
    const DeviceArray<float> maximum(expected_maximum.size()), logsumexp(expected_maximum.size());
    const BlockAttentionParams params{device_q.view(q_shape),
                                      device_k.view(k_shape),
                                      device_rows.view({num_rows}),
                                      device_starts.view({blocks + 1}),
                                      device_cuts.view({sequences + 1}),
                                      0.3,
                                      maximum.view(result_shape),
                                      logsumexp.view(result_shape)};
    check(params);
    block_attention_cuda(params, nullptr);
    const std::string what = describe(shape);
    const auto first_maximum = maximum.download(), first_logsumexp = logsumexp.download();
    testing::expect_close(first_maximum, expected_maximum, what + ", maximum");
    testing::expect_close(first_logsumexp, expected_logsumexp, what + ", logsumexp");
    for (int repeat = 0; repeat < 3; ++repeat) {
        block_attention_cuda(params, nullptr);
        testing::expect_same_bits(maximum.download(), first_maximum, what + ", again");
        testing::expect_same_bits(logsumexp.download(), first_logsumexp, what + ", again");
    }
}

template <typename T>
class BlockAttentionCuda : public ::testing::Test {};
TYPED_TEST_SUITE(BlockAttentionCuda, testing::LowPrecisionTypes);

TYPED_TEST(BlockAttentionCuda, MatchesCpuForEveryHeadSize) {
    for (const int64_t head_dim : {8, 40, 64, 72, 128}) {
        matches_cpu<TypeParam>({{700, 0, 1, 290}, 64, 150, 4, 2, head_dim});
    }
}

TYPED_TEST(BlockAttentionCuda, MatchesCpuForEveryBlockSize) {
    for (const int64_t block : {1, 3, 16, 48, 64, 100, 511, 512, 513, 1000, 5000}) {
        matches_cpu<TypeParam>({{1800, 300}, block, 130, 2, 1, 64});
    }
}

TYPED_TEST(BlockAttentionCuda, MatchesCpuForGroupsOfHeads) {
    matches_cpu<TypeParam>({{400}, 64, 20, 7, 1, 128});
    matches_cpu<TypeParam>({{400}, 64, 20, 4, 4, 128});
    matches_cpu<TypeParam>({{400}, 64, 20, 16, 2, 128});
}

TYPED_TEST(BlockAttentionCuda, MatchesCpuForTilesOfQueries) {
    for (const int64_t num_rows : {0, 1, 127, 128, 129, 700}) {
        matches_cpu<TypeParam>({{300, 77}, 32, num_rows, 3, 3, 64});
        matches_cpu<TypeParam, int64_t>({{300, 77}, 32, num_rows, 3, 3, 64});
    }
}

TYPED_TEST(BlockAttentionCuda, SmallShapes) {
    matches_cpu<TypeParam>({{150, 0, 70}, 48, 12, 2, 1, 64});
    matches_cpu<TypeParam>({{140}, 140, 3, 2, 2, 128});
}

TYPED_TEST(BlockAttentionCuda, ManySequencesAndNone) {
    matches_cpu<TypeParam>({std::vector<int64_t>(300, 7), 4, 100, 2, 1, 16});
    matches_cpu<TypeParam>({{1}, 64, 1, 1, 1, 8});
    matches_cpu<TypeParam>({{0, 0}, 64, 1, 1, 1, 8});
}

TEST(BlockAttentionCuda, MoreChunksThanASecondDimensionOfAGrid) {
    // The second sequence begins with the chunk of index 65535.
    matches_cpu<cpu::BFloat16>({{int64_t{65535} * 512, 1000}, int64_t{1} << 22, 3, 1, 1, 8});
}

TEST(BlockAttentionCuda, RowsThatAreNoTokensSeeNothing) {
    const auto values = random_values<cpu::BFloat16>(40, 1);
    const DeviceArray<cpu::BFloat16> k(values), q(values);
    const DeviceArray<int64_t> rows({-1, 4, 5, int64_t{1} << 32, -(int64_t{1} << 40)});
    const DeviceArray<int32_t> starts({0, 5}), cuts({0, 1});
    const DeviceArray<float> maximum(5), logsumexp(5);
    block_attention_cuda({q.view({5, 1, 8}), k.view({5, 1, 8}), rows.view({5}), starts.view({2}),
                          cuts.view({2}), 1.0, maximum.view({5, 1, 1}), logsumexp.view({5, 1, 1})},
                         nullptr);
    for (const auto& result : {maximum.download(), logsumexp.download()}) {
        for (size_t i = 0; i < 5; ++i) {
            if (i == 1) {
                EXPECT_TRUE(std::isfinite(result[i]));
            } else {
                EXPECT_EQ(result[i], -INFINITY) << i;
            }
        }
    }
}

TEST(BlockAttentionCuda, UnsupportedInputsAreNamed) {
    const DeviceArray<float> q(12), result(1);
    const DeviceArray<int32_t> starts({0, 1}), cuts({0, 1}), rows(std::vector<int32_t>{0});
    try {
        block_attention_cuda(
            {q.view({1, 1, 12}), q.view({1, 1, 12}), rows.view({1}), starts.view({2}),
             cuts.view({2}), 1.0, result.view({1, 1, 1}), result.view({1, 1, 1})},
            nullptr);
        FAIL() << "float32 passed";
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kUnsupported);
    }
}

}  // namespace
}  // namespace lemo
