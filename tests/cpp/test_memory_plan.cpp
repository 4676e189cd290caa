// The planner against all assignments of small random cases, and by hand.
#include "lemo/memory_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <random>
#include <tuple>
#include <vector>

#include "lemo/check.h"

namespace lemo {
namespace {

/// What an assignment takes, layer by layer.
struct Assigned {
    double seconds = 0;
    int64_t host = 0, kept = 0, peak = 0;

    Assigned(const LayerOptions& layers, const std::vector<int32_t>& options, int64_t fixed)
        : peak(fixed) {
        for (size_t layer = 0; layer < layers.size(); ++layer) {
            const LayerOption& option = layers[layer][static_cast<size_t>(options[layer])];
            seconds += option.seconds, host += option.host, kept += option.kept;
            const int64_t moving =
                layer == 0 ? 0 : layers[layer - 1][static_cast<size_t>(options[layer - 1])].moving;
            for (const int64_t moment : {option.forward, option.backward}) {
                peak = std::max(peak, fixed + kept + moving + moment);
            }
        }
    }

    auto order() const { return std::tie(seconds, host, kept); }
};

/// The first of all assignments within the limits, found by trying each.
std::optional<Assigned> try_all(const LayerOptions& layers, const MemoryLimits& limits) {
    std::optional<Assigned> best;
    std::vector<int32_t> options(layers.size(), 0);
    while (true) {
        const Assigned plan(layers, options, limits.fixed);
        const bool fits = plan.peak <= limits.device && plan.host <= limits.host;
        if (fits && (!best || plan.order() < best->order())) best = plan;
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
        const std::optional<Assigned> expected = try_all(layers, limits);
        const MemoryPlan plan = plan_memory(layers, limits);
        ASSERT_EQ(plan.options.empty(), !expected.has_value()) << trial;
        if (!expected) {
            ++refused;
            continue;
        }
        ++fitting;
        const Assigned found(layers, plan.options, limits.fixed);
        ASSERT_EQ(found.order(), expected->order()) << trial;
        ASSERT_LE(found.peak, limits.device) << trial;
        ASSERT_LE(found.host, limits.host) << trial;
        ASSERT_EQ(plan.seconds, found.seconds) << trial;
        ASSERT_EQ(plan.peak, found.peak) << trial;
        ASSERT_EQ(plan.host, found.host) << trial;
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
        const std::optional<Assigned> slower = try_all(layers, exact);
        if (slower) {
            ASSERT_FALSE(plan.options.empty());
            ASSERT_LE(plan.seconds, slower->seconds);
        }
    }
}

TEST(MemoryPlan, BytesAreRoundedUp) {
    // 9 bytes count as 16 on the device, and as 12 on the host.
    const LayerOptions layers{{{9, 0, 0, 9, 1.0}}};
    EXPECT_EQ(plan_memory(layers, {16, 12, 0, 8, 4}).peak, 9);
    EXPECT_TRUE(plan_memory(layers, {15, 12, 0, 8, 4}).options.empty());
    EXPECT_TRUE(plan_memory(layers, {16, 11, 0, 8, 4}).options.empty());
    EXPECT_EQ(least_memory(layers, {0, 12, 0, 8, 4}), 16);
}

TEST(MemoryPlan, FewStatesLoseNoPlanAndLittleTime) {
    std::mt19937 random(4);
    double longer = 0;
    for (int trial = 0; trial < 200; ++trial) {
        LayerOptions layers(8);
        for (std::vector<LayerOption>& options : layers) {
            const auto bytes = static_cast<int64_t>(100 + random() % 100u);
            for (const int64_t part : {1, 4}) {  // stored, or most of it recomputed
                for (int64_t share = 0; share <= 4; ++share) {
                    const int64_t kept = bytes / part, moved = kept * share / 4;
                    const double moving = 0.01 * static_cast<double>(random() % 20u);
                    options.push_back({kept - moved, 0, bytes / 10, moved,
                                       (part == 1 ? 1.0 : 1.25) + moving * share, moved});
                }
            }
        }
        MemoryLimits limits{static_cast<int64_t>(350 + random() % 600u),
                            static_cast<int64_t>(random() % 500u), 0};
        const MemoryPlan best = plan_memory(layers, limits);
        ASSERT_FALSE(best.options.empty()) << trial;
        limits.states = 16;
        longer += plan_memory(layers, limits).seconds / best.seconds - 1;
        limits.states = 4;
        ASSERT_FALSE(plan_memory(layers, limits).options.empty()) << trial;
    }
    EXPECT_GT(longer, 0) << "all states were compared";
    EXPECT_LT(longer / 200, 0.03);
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
    std::vector<int32_t> first_ten(40, 0);
    std::fill_n(first_ten.begin(), 10, 1);
    EXPECT_EQ(plan_memory(LayerOptions(40, layer), {5 + 10 + 300 + 1, 0, 5}).options, first_ten);
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
    EXPECT_EQ(least_memory({{{0, 0, 0, 0, 1.0}}}, {0, 0, 5}), 5);
    // Of both passes of a layer the one counts that takes more.
    EXPECT_EQ(plan_memory({{{1, 7, 2, 0, 1.0}}}, {30, 0, 0}).peak, 8);
    EXPECT_EQ(plan_memory({{{1, 2, 7, 0, 1.0}}}, {30, 0, 0}).peak, 8);
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
    EXPECT_THROW(plan_memory({{{kLargest / 2, 0, 0, 0, 1.0}}}, {1, 1, 1}), Error);
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
