// Which of its options each layer of a step takes, so that the step fits into memory and takes the
// least time.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace lemo {

/// One way to run a layer, such as storing its activations, recomputing or moving them to the host.
struct LayerOption {
    int64_t kept;        // bytes on the device from the layer's forward pass to its backward pass
    int64_t forward;     // bytes for a moment of its forward pass, beyond those kept
    int64_t backward;    // bytes for a moment of its backward pass, beyond those kept
    int64_t host;        // bytes on the host from its forward pass to its backward pass
    double seconds;      // of both passes
    int64_t moving = 0;  // bytes on the device while the next layer runs, on the way to the host or
                         // back
};

/// The options of each layer, in the order of the forward pass.
using LayerOptions = std::vector<std::vector<LayerOption>>;

struct MemoryLimits {
    int64_t device;                // bytes that the step may take on the device
    int64_t host;                  // bytes that options may take on the host
    int64_t fixed;                 // bytes on the device that no option changes
    int64_t granularity = 1;       // bytes that kept ones are rounded up to; 1: exact
    int64_t host_granularity = 1;  // the same of those on the host
    int64_t states = std::numeric_limits<int64_t>::max();  // sets of options that are compared
};

struct MemoryPlan {
    std::vector<int32_t> options;  // the option of each layer
    double seconds;                // of all layers
    int64_t peak;                  // highest bytes on the device, `fixed` among them
    int64_t host;                  // bytes on the host
};

/// The plan with these options. In the passes of a layer exist `fixed`, what it and the layers
/// before it keep, what it takes for a moment, and what the layer right before it moves. Throws
/// Error where an option is none of a layer.
MemoryPlan evaluate_plan(const LayerOptions& layers, const std::vector<int32_t>& options,
                         int64_t fixed);

/// The plan of the least time within the limits; of equally fast ones, that which takes least of
/// the host, keeps least, and least in the first layers. Empty `options` where no plan fits.
/// Optimal for bytes that are rounded up to multiples of the granularities: all sets of options of
/// the layers so far are compared, but those that others surpass in kept bytes, host bytes, bytes
/// that move and time at once. With kept bytes of n multiples and no host bytes that takes n times
/// the number of all options. Where they are more than `states` after a layer, of those that take
/// similar bytes the fastest is compared alone, and the one that keeps least: then another plan may
/// be a little faster. Throws Error on arguments that do not fit.
MemoryPlan plan_memory(const LayerOptions& layers, const MemoryLimits& limits);

/// The fewest bytes on the device that a plan within `host` and the granularity needs; -1 where the
/// host's bound alone rules out every plan.
int64_t least_memory(const LayerOptions& layers, const MemoryLimits& limits);

}  // namespace lemo
