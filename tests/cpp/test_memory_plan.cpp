// The planner against all assignments of small random cases, and by hand.
#include "lemo/memory_plan.h"

#include <gtest/gtest.h>

#include <limits>
#include <optional>
#include <random>

#include "lemo/check.h"

namespace lemo {
namespace {

/// The fastest of all assignments within the limits, found by trying each.
std::optional<MemoryPlan> try_all(const LayerOptions& layers, const MemoryLimits& limits) {
    std::optional<MemoryPlan> best;
    std::vector<int32_t> options(layers.size(), 0);
    while (true) {
        const MemoryPlan plan = evaluate_plan(layers, options, limits.fixed);
        const bool fits = plan.peak <= limits.device && plan.host <= limits.host;
        if (fits && (!best || plan.seconds < best->seconds)) best = plan;
        size_t layer = 0;
        while (layer < layers.size() &&
               ++options[layer] == static_cast<int32_t>(layers[layer].size())) {
            options[layer++] = 0;
        }
        if (layer == layers.size()) return best;
    }
}

LayerOptions random_layers(std::mt19937& random, int64_t most) {
    const auto draw = [&](int64_t end) {
        return static_cast<int64_t>(random() % static_cast<uint32_t>(end));
    };
    LayerOptions layers(static_cast<size_t>(1 + draw(5)));
    for (std::vector<LayerOption>& options : layers) {
        options.resize(static_cast<size_t>(1 + draw(4)));
        for (LayerOption& option : options) {
            // Whole seconds, so that sums in any order are the same.
            const bool moves = draw(3) == 0;
            option = {draw(most),
                      draw(most),
                      draw(most),
                      moves ? draw(most) : 0,
                      static_cast<double>(draw(20)),
                      moves ? draw(most) : 0};
        }
    }
    return layers;
}

TEST(MemoryPlan, IsTheFastestOfAllAssignments) {
    std::mt19937 random(0);
    int fitting = 0, refused = 0;
    for (int trial = 0; trial < 4000; ++trial) {
        const LayerOptions layers = random_layers(random, 30);
        const MemoryLimits limits{static_cast<int64_t>(random() % 150u),
                                  static_cast<int64_t>(random() % 60u),
                                  static_cast<int64_t>(random() % 20u)};
        const std::optional<MemoryPlan> expected = try_all(layers, limits);
        const MemoryPlan plan = plan_memory(layers, limits);
        ASSERT_EQ(plan.options.empty(), !expected.has_value()) << trial;
        if (!expected) {
            ++refused;
            continue;
        }
        ++fitting;
        ASSERT_EQ(plan.seconds, expected->seconds) << trial;
        ASSERT_LE(plan.peak, limits.device) << trial;
        ASSERT_LE(plan.host, limits.host) << trial;
        const MemoryPlan again = evaluate_plan(layers, plan.options, limits.fixed);
        ASSERT_EQ(again.peak, plan.peak);
        ASSERT_EQ(again.host, plan.host);
    }
    EXPECT_GT(fitting, 500);
    EXPECT_GT(refused, 500);
}

TEST(MemoryPlan, LeastMemoryIsThatOfSomeAssignmentAndOfNoneBelow) {
    std::mt19937 random(1);
    for (int trial = 0; trial < 500; ++trial) {
        const LayerOptions layers = random_layers(random, 30);
        MemoryLimits limits{0, static_cast<int64_t>(random() % 60u),
                            static_cast<int64_t>(random() % 20u)};
        const int64_t least = least_memory(layers, limits);
        limits.device = 1000;
        if (least < 0) {
            ASSERT_FALSE(try_all(layers, limits)) << trial;
            continue;
        }
        limits.device = least;
        ASSERT_TRUE(try_all(layers, limits)) << trial;
        if (least == 0) continue;
        limits.device = least - 1;
        ASSERT_FALSE(try_all(layers, limits)) << trial;
    }
}

TEST(MemoryPlan, RoundedBytesNeverExceedTheLimits) {
    std::mt19937 random(2);
    for (int trial = 0; trial < 500; ++trial) {
        const LayerOptions layers = random_layers(random, 100);
        MemoryLimits limits{300, 100, 10, 8, 4};
        const MemoryPlan plan = plan_memory(layers, limits);
        if (!plan.options.empty()) {
            ASSERT_LE(plan.peak, limits.device);
            ASSERT_LE(plan.host, limits.host);
        }
        // Every layer takes at most the granularities more than it needs.
        const auto count = static_cast<int64_t>(layers.size());
        MemoryLimits exact{limits.device - 8 * count, limits.host - 4 * count, 10};
        const std::optional<MemoryPlan> slower = try_all(layers, exact);
        if (slower) {
            ASSERT_FALSE(plan.options.empty());
            ASSERT_LE(plan.seconds, slower->seconds);
        }
    }
}

TEST(MemoryPlan, ByHand) {
    // Store 10 bytes, or store 1 and need 4 more for a moment of backward, one second longer.
    const std::vector<LayerOption> layer{{10, 0, 1, 0, 1.0}, {1, 0, 4, 0, 2.0}};
    const LayerOptions layers(3, layer);
    EXPECT_EQ(plan_memory(layers, {36, 0, 5}).options, (std::vector<int32_t>{0, 0, 0}));
    // One layer is recomputed: the first, at whose backward pass least is stored.
    const MemoryPlan plan = plan_memory(layers, {27, 0, 5});
    EXPECT_EQ(plan.seconds, 4.0);
    EXPECT_EQ(plan.peak, 27);
    EXPECT_EQ(plan.options, (std::vector<int32_t>{1, 0, 0}));
    EXPECT_EQ(least_memory(layers, {0, 0, 5}), 12);
    EXPECT_TRUE(plan_memory(layers, {11, 0, 5}).options.empty());
    // The host takes what the device cannot.
    const std::vector<LayerOption> offloaded{{10, 0, 1, 0, 1.0}, {0, 2, 2, 10, 1.5}};
    EXPECT_EQ(plan_memory({offloaded, offloaded}, {21, 10, 0}).seconds, 2.0);
    EXPECT_EQ(plan_memory({offloaded, offloaded}, {12, 10, 0}).host, 10);
    EXPECT_EQ(least_memory({offloaded, offloaded}, {0, 0, 0}), 21);
    EXPECT_EQ(least_memory({{{0, 0, 0, 9, 1.0}}}, {0, 8, 0}), -1);
    // What moves to the host is still there while the next layer runs.
    const std::vector<LayerOption> leaving{{0, 2, 2, 10, 1.5, 10}};
    EXPECT_EQ(plan_memory({leaving, offloaded}, {30, 20, 0}).peak, 21);
    EXPECT_EQ(plan_memory({leaving, leaving}, {30, 20, 0}).peak, 12);
    EXPECT_EQ(least_memory({leaving, leaving, leaving}, {0, 30, 0}), 12);
    // No layers: the rest has to fit.
    EXPECT_EQ(plan_memory({}, {5, 0, 5}).peak, 5);
}

TEST(MemoryPlan, HundredLayersOfTheirOwnSizes) {
    std::mt19937 random(3);
    LayerOptions layers(100);
    int64_t all = 0;
    for (std::vector<LayerOption>& options : layers) {
        const int64_t bytes = (int64_t{1} << 30) + static_cast<int64_t>(random() % (1u << 30));
        options = {{bytes, 0, bytes / 10, 0, 1.0},
                   {bytes / 5, 0, bytes / 4, 0, 1.25},
                   {bytes / 10, 0, bytes / 3, 0, 1.5}};
        all += bytes;
    }
    const MemoryPlan plan = plan_memory(layers, {all / 2, 0, 0, int64_t{1} << 22});
    ASSERT_EQ(plan.options.size(), layers.size());
    EXPECT_LE(plan.peak, all / 2);
    EXPECT_LT(plan.seconds, 125);
    EXPECT_GT(plan.seconds, 110);
}

TEST(MemoryPlan, RefusesWhatDoesNotFit) {
    const std::vector<LayerOption> layer{{1, 1, 1, 1, 1.0}};
    EXPECT_THROW(plan_memory({{}}, {1, 1, 1}), Error);
    EXPECT_THROW(plan_memory({layer}, {-1, 1, 1}), Error);
    EXPECT_THROW(plan_memory({layer}, {1, 1, 1, 0}), Error);
    EXPECT_THROW(plan_memory({{{-1, 0, 0, 0, 1.0}}}, {1, 1, 1}), Error);
    EXPECT_THROW(plan_memory({{{1, 0, 0, 0, -1.0}}}, {1, 1, 1}), Error);
    EXPECT_THROW(evaluate_plan({layer}, {1}, 0), Error);
    EXPECT_THROW(evaluate_plan({layer}, {}, 0), Error);
    // Sums of these would overflow.
    constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
    EXPECT_THROW(evaluate_plan({layer}, {0}, kLargest), Error);
    EXPECT_THROW(plan_memory({layer}, {kLargest, kLargest, kLargest}), Error);
    EXPECT_THROW(plan_memory({layer}, {kLargest, kLargest, 0, kLargest}), Error);
    EXPECT_THROW(plan_memory({layer}, {kLargest, kLargest, 0, 1, kLargest}), Error);
    EXPECT_EQ(plan_memory({layer}, {kLargest, kLargest, 1}).peak, 3);
    try {
        least_memory({layer}, {0, 0, kLargest - 1});
        FAIL() << "more bytes than sums can hold passed";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(),
                     "[lemo:value] least_memory: argument 'fixed': expected from 0 to "
                     "576460752303423487, got 9223372036854775806");
    }
}

}  // namespace
}  // namespace lemo
