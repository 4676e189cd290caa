// Tiles, registers, barriers, shared memory and arguments of the kernel of block_scores, Hopper
// tier.
#pragma once

#include "block_scores/plan.h"
#include "common/hopper.h"

namespace lemo::cuda::block_scores::hopper {

// Maxima of pairs of blocks that are gathered at a time.
inline constexpr int kCells = 256;

static_assert(kCells >= kKeyRows && kCells >= kQueryRows, "a row of pairs must fit");

template <typename Element_, int kHeadDim_>
struct ScoresTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    // A consumer warpgroup has 64 of the queries and all keys of a pair.
    static constexpr int kConsumers = 2;
    static_assert(kQueryRows == 64 * kConsumers, "wgmma has 64 rows for each warpgroup");
    // Keys of one mma. A thread holds the sums of both halves of its keys, 128 registers, and the
    // accumulators of one half, 64.
    static constexpr int kMmaKeys = kKeyRows / 2;
    // Each key head in use and the next one. Copies of queries run ahead of their use by the other
    // stages.
    static constexpr int kKeyStages = 2;
    static constexpr int kQueryStages = kHeadDim == 64 ? 6 : 3;
    static constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
    using Registers = RegisterBudget<40, 232, kConsumers>;

    using Mma = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::ss_op_selector<
            Element, Element, float,
            cute::Shape<cute::_64, cute::Int<kMmaKeys>, cute::Int<kHeadDim>>>(),
        cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));
    using QueryLayout = SwizzledRows<Element, kQueryRows, kHeadDim>;
    using KeyLayout = SwizzledRows<Element, kMmaKeys, kHeadDim>;
};

/// A pair of tiles as the warps of a thread block hand it on.
struct Job {
    int query_row, query_end, key_row, key_end;
    int num_queries, num_keys;  // blocks of the tiles
    int key_halves;  // how many halves of the keys some query sees, at least 1; 0: no more jobs
    bool first_of_tile, last_of_tile;  // of queries
    bool last_of_item;
    bool mixed_columns;  // a block of keys begins elsewhere than at a multiple of eight
    int part, first_block;
    // Bit i is set where a block begins at row i of the pair, other than the first block.
    uint32_t query_starts[kQueryRows / 32], key_starts[kKeyRows / 32];
};

/// Everything a thread block has in shared memory. A `full` barrier says that a buffer was filled,
/// an `empty` one that all who read it are done.
template <typename Traits>
struct ScoresShared {
    using Element = typename Traits::Element;
    static constexpr int kMmaKeyElements = Traits::kMmaKeys * Traits::kHeadDim;
    static constexpr int kQueryElements = kQueryRows * Traits::kHeadDim;

    alignas(1024) Element keys[Traits::kKeyStages][2][kMmaKeyElements];
    alignas(1024) Element queries[Traits::kQueryStages][kQueryElements];
    int cells[2][kCells];  // I[m, n] of some pairs of blocks, as bits
    Job jobs[2];           // the one in use and the next one
    Barrier keys_full[Traits::kKeyStages], keys_empty[Traits::kKeyStages];
    Barrier queries_full[Traits::kQueryStages], queries_empty[Traits::kQueryStages];
    Barrier cells_full[2], cells_empty[2];
    Barrier job_full[2], job_empty[2];
    // The scheduler barrier: on each of them the warps of the other consumer warpgroup arrive when
    // this one may start an mma.
    Barrier scheduler[Traits::kConsumers];

    /// How many arrivals complete a phase of each barrier. For one thread.
    __device__ void init_barriers() {
        constexpr int kConsumerThreads = kWarpgroupThreads * Traits::kConsumers;
        constexpr int kConsumerWarps = kConsumerThreads / 32;
        static_assert(Traits::kConsumers == 2, "the scheduler barriers alternate between two");
        for (int stage = 0; stage < Traits::kKeyStages; ++stage) {
            keys_full[stage].init(1);
            keys_empty[stage].init(kConsumerWarps);
        }
        for (int stage = 0; stage < Traits::kQueryStages; ++stage) {
            queries_full[stage].init(1);
            queries_empty[stage].init(kConsumerWarps);
        }
        for (int warpgroup = 0; warpgroup < Traits::kConsumers; ++warpgroup) {
            scheduler[warpgroup].init(4);  // the warps of the other one
        }
        for (int stage = 0; stage < 2; ++stage) {
            cells_full[stage].init(kConsumerThreads);
            cells_empty[stage].init(32);
            job_full[stage].init(32);
            // The consumers, the warp that adds up and the thread that copies.
            job_empty[stage].init(kConsumerThreads + 32 + 1);
        }
        publish_barriers();
    }
};

struct HopperScoresArguments {
    CUtensorMap q;
    CUtensorMap k;
    ScoresArguments plan;
};

}  // namespace lemo::cuda::block_scores::hopper
