#include "lemo/memory_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <tuple>

#include "lemo/blocks.h"
#include "lemo/check.h"

namespace lemo {
namespace {

/// Options of the first layers: what they take together, and how they came to be.
struct State {
    int64_t kept;
    int64_t host;
    int64_t moving;  // of the last layer
    double seconds;
    int32_t parent;  // among the states of one layer less
    int32_t option;  // of the last layer
};

/// The most bytes of a layer, and of the rest: sums of all layers, rounded up, stay within int64.
int64_t largest_bytes(const LayerOptions& layers) {
    return std::numeric_limits<int64_t>::max() / 8 / (static_cast<int64_t>(layers.size()) + 1);
}

void check_layers(const Checker& check, const LayerOptions& layers) {
    const int64_t largest = largest_bytes(layers);
    for (const std::vector<LayerOption>& options : layers) {
        check.that(!options.empty(), "layers", "one or more options of each layer", "none");
        for (const LayerOption& option : options) {
            for (const int64_t bytes :
                 {option.kept, option.forward, option.backward, option.host, option.moving}) {
                check.that(bytes >= 0 && bytes <= largest, "layers",
                           "bytes of at least 0 whose sum is an int64", bytes);
            }
            check.that(
                option.seconds >= 0 && option.seconds < std::numeric_limits<double>::infinity(),
                "layers", "seconds of at least 0", option.seconds);
        }
    }
}

void check_bytes(const Checker& check, const LayerOptions& layers, const char* argument,
                 int64_t bytes, int64_t least) {
    const int64_t largest = largest_bytes(layers);
    check.that(
        bytes >= least && bytes <= largest, argument,
        [&] { return "from " + std::to_string(least) + " to " + std::to_string(largest); }, bytes);
}

void check_limits(const Checker& check, const LayerOptions& layers, const MemoryLimits& limits) {
    check.that(limits.device >= 0, "device", "at least 0", limits.device);
    check.that(limits.host >= 0, "host", "at least 0", limits.host);
    check_bytes(check, layers, "fixed", limits.fixed, 0);
    check_bytes(check, layers, "granularity", limits.granularity, 1);
    check_bytes(check, layers, "host_granularity", limits.host_granularity, 1);
    check.that(limits.states >= 2, "states", "at least 2", limits.states);
}

/// Removes states that another one surpasses, or equals, in everything.
void remove_surpassed(std::vector<State>& states) {
    // Stable: of equals the one stays whose earlier layers keep less.
    std::stable_sort(states.begin(), states.end(), [](const State& a, const State& b) {
        return std::tie(a.kept, a.host, a.moving, a.seconds) <
               std::tie(b.kept, b.host, b.moving, b.seconds);
    });
    // Of the states so far, which keep less: for the bytes that move, the least time for at most so
    // many bytes of the host.
    std::map<int64_t, std::map<int64_t, double>> of_moving;
    const auto is_surpassed = [&](const State& state) {
        for (const auto& [moving, fastest] : of_moving) {
            if (moving > state.moving) break;
            const auto next = fastest.upper_bound(state.host);
            if (next != fastest.begin() && std::prev(next)->second <= state.seconds) return true;
        }
        std::map<int64_t, double>& fastest = of_moving[state.moving];
        auto next = fastest.upper_bound(state.host);
        while (next != fastest.end() && next->second >= state.seconds) next = fastest.erase(next);
        fastest[state.host] = state.seconds;
        return false;
    };
    states.erase(std::remove_if(states.begin(), states.end(), is_surpassed), states.end());
}

/// Of states that are alike within `width` bytes, leaves the fastest and the one that keeps least.
std::vector<State> alike_once(const std::vector<State>& states, int64_t width) {
    using Cell = std::tuple<int64_t, int64_t, int64_t>;
    std::map<Cell, std::pair<size_t, size_t>> cells;
    for (size_t index = 0; index < states.size(); ++index) {
        const State& state = states[index];
        const Cell cell{state.kept / width, state.host / width, state.moving / width};
        const auto [found, is_new] = cells.try_emplace(cell, index, index);
        // In ascending order of what they keep: the first one keeps least.
        if (!is_new && state.seconds < states[found->second.second].seconds) {
            found->second.second = index;
        }
    }
    std::vector<bool> stays(states.size());
    for (const auto& [cell, pair] : cells) stays[pair.first] = stays[pair.second] = true;
    std::vector<State> left;
    for (size_t index = 0; index < states.size(); ++index) {
        if (stays[index]) left.push_back(states[index]);
    }
    return left;
}

/// Leaves at most so many states, or two, by taking similar ones for one.
void thin(std::vector<State>& states, int64_t most) {
    if (static_cast<int64_t>(states.size()) <= most) return;
    int64_t range = 1;
    for (const State& state : states) range = std::max(range, state.kept + state.host);
    // About as many cells as states in a plane; most cells are empty.
    const double cells = 4 * std::sqrt(static_cast<double>(most));
    int64_t width = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(range) / cells));
    while (static_cast<int64_t>(states.size()) > std::max<int64_t>(most, 2)) {
        states = alike_once(states, width);
        width *= 2;
    }
}

int64_t at_a_time(const LayerOption& option) { return std::max(option.forward, option.backward); }

}  // namespace

MemoryPlan evaluate_plan(const LayerOptions& layers, const std::vector<int32_t>& options,
                         int64_t fixed) {
    const Checker check("evaluate_plan");
    check_layers(check, layers);
    check_bytes(check, layers, "fixed", fixed, 0);
    check.that(options.size() == layers.size(), "options", "one for each layer",
               static_cast<int64_t>(options.size()));
    MemoryPlan plan{options, 0, fixed, 0};
    int64_t kept = fixed, moving = 0;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
        const int32_t index = options[layer];
        check.that(index >= 0 && static_cast<size_t>(index) < layers[layer].size(), "options",
                   "an option of the layer", index);
        const LayerOption& option = layers[layer][static_cast<size_t>(index)];
        kept += option.kept;
        plan.peak = std::max(plan.peak, kept + at_a_time(option) + moving);
        moving = option.moving;
        plan.host += option.host;
        plan.seconds += option.seconds;
    }
    return plan;
}

MemoryPlan plan_memory(const LayerOptions& layers, const MemoryLimits& limits) {
    const Checker check("plan_memory");
    check_layers(check, layers);
    check_limits(check, layers, limits);
    const auto rounded = [](int64_t bytes, int64_t granularity) {
        return ceil_div(bytes, granularity) * granularity;
    };
    const int64_t room = limits.device - limits.fixed;
    std::vector<std::vector<State>> states{{{0, 0, 0, 0.0, -1, -1}}};
    for (const std::vector<LayerOption>& options : layers) {
        std::vector<State> next;
        for (size_t parent = 0; parent < states.back().size(); ++parent) {
            const State& before = states.back()[parent];
            for (size_t index = 0; index < options.size(); ++index) {
                const LayerOption& option = options[index];
                const int64_t kept = before.kept + rounded(option.kept, limits.granularity);
                const int64_t host = before.host + rounded(option.host, limits.host_granularity);
                const int64_t highest = kept + at_a_time(option) + before.moving;
                if (highest > room || host > limits.host) continue;
                next.push_back({kept, host, option.moving, before.seconds + option.seconds,
                                static_cast<int32_t>(parent), static_cast<int32_t>(index)});
            }
        }
        if (next.empty()) return {{}, 0, 0, 0};
        remove_surpassed(next);
        thin(next, limits.states);
        states.push_back(std::move(next));
    }
    const std::vector<State>& last = states.back();
    const auto best =
        std::min_element(last.begin(), last.end(), [](const State& a, const State& b) {
            return std::tie(a.seconds, a.host, a.kept) < std::tie(b.seconds, b.host, b.kept);
        });
    std::vector<int32_t> chosen(layers.size());
    const State* state = &*best;
    for (size_t layer = layers.size(); layer > 0; --layer) {
        chosen[layer - 1] = state->option;
        state = &states[layer - 1][static_cast<size_t>(state->parent)];
    }
    return evaluate_plan(layers, chosen, limits.fixed);
}

int64_t least_memory(const LayerOptions& layers, const MemoryLimits& limits) {
    const Checker check("least_memory");
    check_layers(check, layers);
    check_limits(check, layers, limits);
    MemoryLimits tried = limits;
    // Without a limit of the device every option fits, so any plan is an upper bound.
    int64_t enough = limits.fixed;
    for (const std::vector<LayerOption>& options : layers) {
        int64_t most = 0;
        for (const LayerOption& option : options) {
            most = std::max(most,
                            option.kept + limits.granularity + at_a_time(option) + option.moving);
        }
        enough += most;
    }
    tried.device = enough;
    if (plan_memory(layers, tried).options.size() != layers.size()) return -1;
    int64_t too_little = limits.fixed - 1;
    while (enough - too_little > 1) {
        const int64_t middle = too_little + (enough - too_little) / 2;
        tried.device = middle;
        const bool fits = plan_memory(layers, tried).options.size() == layers.size();
        (fits ? enough : too_little) = middle;
    }
    return enough;
}

}  // namespace lemo
