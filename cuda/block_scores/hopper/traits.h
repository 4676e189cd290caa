// Tiles, shared memory and arguments of the block_scores kernel for compute capability 9.0.
#pragma once

#include "block_scores/plan.h"
#include "common/hopper.h"

namespace lemo::block_scores::hopper {

// Maxima of pairs of blocks that are gathered at a time.
inline constexpr int kCells = 256;

static_assert(kCells >= kKeyRows && kCells >= kQueryRows, "a row of pairs must fit");

template <typename Element_, int kHeadDim_>
struct Traits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    // A consumer warpgroup has 64 of the queries and all keys of a pair.
    static constexpr int kConsumers = 2;
    static_assert(kQueryRows == 64 * kConsumers);
    // Keys of one product. A thread holds the sums of both halves of its keys, 128 registers, and
    // the product of one half, 64.
    static constexpr int kProductKeys = kKeyRows / 2;
    // Each key head in use and the next one. Copies of queries run ahead of their use by the other
    // stages.
    static constexpr int kKeyStages = 2;
    static constexpr int kQueryStages = kHeadDim == 64 ? 6 : 3;
    static constexpr int kThreads = cuda::kWarpgroupThreads * (1 + kConsumers);
    // The 65536 registers of a multiprocessor, in steps of eight a thread.
    static constexpr int kProducerRegisters = 40;
    static constexpr int kConsumerRegisters = 232;

    using Mma = decltype(cute::make_tiled_mma(
        cute::SM90::GMMA::ss_op_selector<
            Element, Element, float,
            cute::Shape<cute::_64, cute::Int<kProductKeys>, cute::Int<kHeadDim>>>(),
        cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>{}));
    using QueryLayout = cuda::SwizzledRows<Element, kQueryRows, kHeadDim>;
    using KeyLayout = cuda::SwizzledRows<Element, kProductKeys, kHeadDim>;
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
struct Shared {
    using Element = typename Traits::Element;
    static constexpr int kProductKeyElements = Traits::kProductKeys * Traits::kHeadDim;
    static constexpr int kQueryElements = kQueryRows * Traits::kHeadDim;

    alignas(1024) Element keys[Traits::kKeyStages][2][kProductKeyElements];
    alignas(1024) Element queries[Traits::kQueryStages][kQueryElements];
    int cells[2][kCells];  // I[m, n] of some pairs of blocks, as bits
    Job jobs[2];           // the one in use and the next one
    cuda::Barrier keys_full[Traits::kKeyStages], keys_empty[Traits::kKeyStages];
    cuda::Barrier queries_full[Traits::kQueryStages], queries_empty[Traits::kQueryStages];
    cuda::Barrier cells_full[2], cells_empty[2];
    cuda::Barrier job_full[2], job_empty[2];
    cuda::Barrier turns[Traits::kConsumers];
};

struct HopperArguments {
    CUtensorMap q;
    CUtensorMap k;
    Arguments plan;
};

}  // namespace lemo::block_scores::hopper
