// Which tile of queries a thread block works on, and the keys it needs for it.
#pragma once

#include "segment_attention/hopper/forward_layout.h"

namespace lemo::cuda::segment_attention::hopper {

/// A tile of queries of one head. Items of work are numbered by sections of a few key/value heads,
/// so that their keys stay in the L2 cache, and within a section so that tiles with the most keys
/// come first: the short ones fill the end, and blocks that run together read the same few keys.
struct ForwardWork {
    int head;
    int kv_head;
    SequenceTile tile;
    int m_first;  // first row of the tile in its sequence
    int n_begin;  // tiles of keys that some query of the tile sees
    int n_end;
    bool exists;  // false where the upper bound on the number of tiles was too high

    template <typename Traits>
    __device__ static ForwardWork make(const ForwardArguments& args, int index) {
        ForwardWork work;
        const int section_items = args.heads_at_once * args.plan.max_q_tiles;
        const int first_head = index / section_items * args.heads_at_once;
        const int heads = min(args.heads_at_once, args.num_heads - first_head);
        const int item = index % section_items;
        work.head = first_head + item % heads;
        work.kv_head = work.head / (args.num_heads / args.num_kv_heads);
        const int packed_tile = args.plan.max_q_tiles - 1 - item / heads;
        work.exists = find_tile(args.plan, args.plan.cu_q_tiles, args.plan.cu_q, Traits::kBlockM,
                                packed_tile, work.tile);
        if (!work.exists) return work;
        work.m_first = work.tile.tile * Traits::kBlockM;
        const VisibleKeys visible(args.plan, work.tile, work.head, args.num_heads);
        work.n_begin = visible(work.m_first).x / Traits::kBlockN;
        work.n_end = ceil_div(visible(work.m_first + Traits::kBlockM - 1).y, Traits::kBlockN);
        return work;
    }

    __device__ static int count(const ForwardArguments& args) {
        return args.num_heads * args.plan.max_q_tiles;
    }
};

/// The producer's side: takes items from a counter in global memory, shows them to the consumers.
template <typename Traits>
class WorkQueue {
public:
    __device__ WorkQueue(const ForwardArguments& args, ForwardShared<Traits>& shared)
        : args_(args), shared_(shared) {}

    /// The next item; false behind the last one. One thread of the block calls this.
    __device__ bool next(ForwardWork& work) {
        const int count = ForwardWork::count(args_);
        do {
            // Not before it is needed, or it would wait behind this block's item in work while
            // others have none; the consumers still work on that one while the counter answers.
            index_ = index_ < 0 ? static_cast<int>(blockIdx.x)
                                : static_cast<int>(gridDim.x) + atomicAdd(args_.next_work, 1);
            if (index_ < count) work = ForwardWork::make<Traits>(args_, index_);
        } while (index_ < count && !work.exists);
        shared_.work_empty[at_.stage].wait(at_.parity ^ 1);
        shared_.work[at_.stage] = index_;
        shared_.work_full[at_.stage].arrive();
        at_.advance();
        return index_ < count;
    }

private:
    const ForwardArguments& args_;
    ForwardShared<Traits>& shared_;
    int index_ = -1;
    RingPosition<2> at_;
};

/// The consumers' side.
template <typename Traits>
class WorkReader {
public:
    __device__ WorkReader(const ForwardArguments& args, ForwardShared<Traits>& shared)
        : args_(args), shared_(shared) {}

    /// The next item; false behind the last one. All threads of the consumers call this.
    __device__ bool next(ForwardWork& work) {
        shared_.work_full[at_.stage].wait(at_.parity);
        const int index = warp_uniform(shared_.work[at_.stage]);
        shared_.work_empty[at_.stage].arrive();
        at_.advance();
        if (index >= ForwardWork::count(args_)) return false;
        work = ForwardWork::make<Traits>(args_, index);
        work.n_begin = warp_uniform(work.n_begin);
        work.n_end = warp_uniform(work.n_end);
        return true;
    }

private:
    const ForwardArguments& args_;
    ForwardShared<Traits>& shared_;
    RingPosition<2> at_;
};

}  // namespace lemo::cuda::segment_attention::hopper
