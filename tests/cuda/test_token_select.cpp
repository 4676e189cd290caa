#include "lemo/token_select.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string_view>

#include "compare.h"
#include "device_views.h"
#include "lemo/blocks.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using testing::DeviceArray;
using testing::view;

struct Policy {
    const char* name;
    double value;
    int64_t keep_first, keep_last;
};

/// What token_select gives, from the CPU or from the GPU.
struct Selected {
    std::vector<int32_t> places, cu_kept, cu_rows, kept_blocks, rows, positions;
    std::vector<int64_t> counts;

    Selected(int64_t blocks, int64_t sequences)
        : places(2 * blocks), cu_kept(sequences + 1), cu_rows(sequences + 1), counts(2) {}

    bool operator==(const Selected&) const = default;
};

Selected select_on_cpu(std::vector<float> scores, BlockPlan plan, const Policy& policy) {
    const int64_t blocks = scores.size(), sequences = plan.cu_blocks.size() - 1;
    Selected result(blocks, sequences);
    const Tensor starts = view(plan.block_starts, {blocks + 1});
    const Tensor cuts = view(plan.cu_blocks, {sequences + 1});
    const Tensor places = view(result.places, {blocks, 2});
    const Tensor cu_kept = view(result.cu_kept, {sequences + 1});
    const Tensor cu_rows = view(result.cu_rows, {sequences + 1});
    token_select_cpu({view(scores, {blocks}), starts, cuts, policy.name, policy.value,
                      policy.keep_first, policy.keep_last, places, cu_kept, cu_rows,
                      view(result.counts, {2})});
    const auto [kept, rows] = std::pair{result.counts[0], result.counts[1]};
    result.kept_blocks.resize(kept);
    result.rows.resize(rows);
    result.positions.resize(rows);
    token_rows_cpu({starts, cuts, places, cu_kept, cu_rows, view(result.kept_blocks, {kept}),
                    view(result.rows, {rows}), view(result.positions, {rows})});
    return result;
}

Selected select_on_gpu(const std::vector<float>& scores, const BlockPlan& plan,
                       const Policy& policy) {
    const int64_t blocks = scores.size(), sequences = plan.cu_blocks.size() - 1;
    Selected result(blocks, sequences);
    const DeviceArray<float> device_scores(scores);
    const DeviceArray<int32_t> starts(plan.block_starts), cuts(plan.cu_blocks);
    const DeviceArray<int32_t> places(2 * blocks), cu_kept(sequences + 1), cu_rows(sequences + 1);
    const DeviceArray<int64_t> counts(2);
    const TokenSelectParams params{device_scores.view({blocks}),
                                   starts.view({blocks + 1}),
                                   cuts.view({sequences + 1}),
                                   policy.name,
                                   policy.value,
                                   policy.keep_first,
                                   policy.keep_last,
                                   places.view({blocks, 2}),
                                   cu_kept.view({sequences + 1}),
                                   cu_rows.view({sequences + 1}),
                                   counts.view({2})};
    check(params);
    token_select_cuda(params, nullptr);
    result.counts = counts.download();
    const auto [kept, rows] = std::pair{result.counts[0], result.counts[1]};
    const DeviceArray<int32_t> kept_blocks(kept), packed(rows), positions(rows);
    const TokenRowsParams rows_params{
        params.block_starts, params.cu_blocks,         params.places,       params.cu_kept,
        params.cu_rows,      kept_blocks.view({kept}), packed.view({rows}), positions.view({rows})};
    check(rows_params);
    token_rows_cuda(rows_params, nullptr);
    result.places = places.download();
    result.cu_kept = cu_kept.download();
    result.cu_rows = cu_rows.download();
    result.kept_blocks = kept_blocks.download();
    result.rows = packed.download();
    result.positions = positions.download();
    return result;
}

/// Scores of `levels` different values, half of them negative: few levels make many ties.
std::vector<float> draw_scores(int64_t blocks, int levels, uint32_t seed) {
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int> level(-levels, levels);
    std::vector<float> scores(static_cast<size_t>(blocks));
    for (float& score : scores) {
        score = static_cast<float>(level(generator)) / static_cast<float>(levels);
        if (score == 0 && generator() % 2) score = -0.0f;  // equal to 0
    }
    return scores;
}

void expect_same_as_cpu(const std::vector<int64_t>& seqlens, int64_t block_size) {
    const BlockPlan plan = plan_blocks(seqlens, block_size);
    const int64_t blocks = plan.block_starts.size() - 1;
    for (const int levels : {1, 7, 1 << 22}) {
        const auto scores = draw_scores(blocks, levels, 3 + levels);
        for (const Policy& policy : {Policy{"ratio", 0.5, 1, 1},
                                     {"ratio", 0.07, 0, 0},
                                     {"ratio", 0.999, 0, 2},
                                     {"ratio", 0.0, 0, 0},
                                     {"ratio", 0.0, 3, 1},
                                     {"ratio", 1.0, 0, 0},
                                     {"threshold", 0.25, 1, 1},
                                     {"threshold", -INFINITY, 0, 0},
                                     {"threshold", 9.0, 0, 0}}) {
            const Selected selected = select_on_gpu(scores, plan, policy);
            ASSERT_EQ(selected, select_on_cpu(scores, plan, policy))
                << policy.name << " " << policy.value << ", " << seqlens.size()
                << " sequences in blocks of " << block_size << ", " << levels << " levels";
            if (std::string_view(policy.name) != "ratio") continue;
            const SelectionSize size = plan_selection(seqlens, block_size, policy.value,
                                                      policy.keep_first, policy.keep_last);
            ASSERT_EQ(size.blocks, selected.counts[0]);
            ASSERT_TRUE(size.rows == -1 || size.rows == selected.counts[1]);
        }
    }
}

TEST(TokenSelectCuda, SameSetsAsCpu) {
    expect_same_as_cpu({}, 64);
    expect_same_as_cpu({0}, 64);
    expect_same_as_cpu({1}, 64);
    expect_same_as_cpu({130, 0, 64, 1, 0}, 64);
    expect_same_as_cpu({65536}, 64);              // one step of the thread block
    expect_same_as_cpu({65536 + 64, 65535}, 64);  // a little more, and one block less
    expect_same_as_cpu({(1 << 20) + 5}, 64);      // 17 steps
    expect_same_as_cpu({0, 20000, 7, 0, 9000}, 1);
    expect_same_as_cpu({5000, 100}, 100000);  // a block longer than its sequence
}

TEST(TokenSelectCuda, SmallSequencesAndSeveralSteps) {
    expect_same_as_cpu({130, 0, 64, 1, 0}, 64);
    expect_same_as_cpu({2500}, 1);  // three steps of the thread block
    expect_same_as_cpu({1100, 40}, 1);
}

TEST(TokenSelectCuda, ManySequences) {
    std::mt19937 generator(5);
    std::vector<int64_t> seqlens(3000);
    for (int64_t& length : seqlens) length = generator() % 90;
    expect_same_as_cpu(seqlens, 8);
}

TEST(TokenSelectCuda, InfiniteScoresAndNaNAreOrdered) {
    const BlockPlan plan = plan_blocks({5}, 1);
    const std::vector<float> scores{NAN, -INFINITY, INFINITY, -3e38f, NAN};
    using Blocks = std::vector<int32_t>;
    EXPECT_EQ(select_on_gpu(scores, plan, {"ratio", 0.4, 0, 0}).kept_blocks, (Blocks{2, 3}));
    EXPECT_EQ(select_on_gpu(scores, plan, {"ratio", 0.6, 0, 0}).kept_blocks, (Blocks{1, 2, 3}));
    EXPECT_EQ(select_on_gpu(scores, plan, {"ratio", 0.8, 0, 0}).kept_blocks, (Blocks{0, 1, 2, 3}));
    EXPECT_EQ(select_on_gpu(scores, plan, {"threshold", -INFINITY, 0, 0}).kept_blocks,
              (Blocks{1, 2, 3}));
}

TEST(TokenSelectCuda, RepeatsAreBitEqual) {
    const BlockPlan plan = plan_blocks({100000, 30000, 5}, 16);
    const auto scores = draw_scores(plan.block_starts.size() - 1, 50, 6);
    const Selected first = select_on_gpu(scores, plan, {"ratio", 0.4, 1, 1});
    for (int i = 0; i < 20; ++i) {
        ASSERT_EQ(select_on_gpu(scores, plan, {"ratio", 0.4, 1, 1}), first);
    }
}

TEST(TokenSelectCuda, WritesNothingBeyondSizesThatAreTooSmall) {
    const BlockPlan plan = plan_blocks({64, 64}, 8);
    const std::vector<float> scores(16, 1.0f);
    const Policy all{"ratio", 1.0, 0, 0};
    Selected full = select_on_cpu(scores, plan, all);
    const DeviceArray<int32_t> starts(plan.block_starts), cuts(plan.cu_blocks);
    const DeviceArray<int32_t> places(full.places), cu_kept(full.cu_kept), cu_rows(full.cu_rows);
    const DeviceArray<int32_t> kept_blocks(10), rows(85), positions(85);
    token_rows_cuda(
        {starts.view({17}), cuts.view({3}), places.view({16, 2}), cu_kept.view({3}),
         cu_rows.view({3}), kept_blocks.view({10}), rows.view({85}), positions.view({85})},
        nullptr);
    full.kept_blocks.resize(10);
    full.rows.resize(85);
    EXPECT_EQ(kept_blocks.download(), full.kept_blocks);
    EXPECT_EQ(rows.download(), full.rows);
}

}  // namespace
}  // namespace lemo
