// How thread blocks add to the gradient of the queries (dq), and in which order.
#pragma once

#include "segment_attention/portable/backward_traits.h"

namespace lemo::cuda::segment_attention::portable {

/// Where the accumulators of a query tile lie in scratch. Neighbouring threads are neighbours in
/// memory, so a warp adds whole sectors; compute capability 9.0 adds four floats at once.
template <typename Traits>
struct DqAccumulators {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    static constexpr int kVector = 4;
#else
    static constexpr int kVector = 1;
#endif
    float* first;

    __device__ DqAccumulators(const BackwardArguments& args, int head, int packed_tile)
        : first(args.dq_sums + (int64_t{head} * args.plan.max_q_tiles + packed_tile) *
                                   Traits::kBlockM * Traits::kHeadDim) {}

    /// Adds part `part` of `parts`.
    template <typename Accumulators>
    __device__ __forceinline__ void add(const Accumulators& dq, int part, int parts) const {
        const int count = Traits::kDqPerThread / parts;
        CUTE_UNROLL
        for (int i = part * count; i < (part + 1) * count; i += kVector) {
            float* to = first + i * Traits::kThreads + threadIdx.x * kVector;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
            // atomicAdd of a float4 would also fetch what was there.
            asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to),
                         "f"(dq(i)), "f"(dq(i + 1)), "f"(dq(i + 2)), "f"(dq(i + 3))
                         : "memory");
#else
            atomicAdd(to, dq(i));
#endif
        }
    }

    template <typename Accumulators>
    __device__ __forceinline__ void read(Accumulators& dq) const {
        CUTE_UNROLL
        for (int i = 0; i < Traits::kDqPerThread; i += kVector) {
            const float* from = first + i * Traits::kThreads + threadIdx.x * kVector;
            CUTE_UNROLL
            for (int j = 0; j < kVector; ++j) dq(i + j) = from[j];
        }
    }
};

/// The place of this thread block among those that add to a query tile, in the order of their key
/// tiles. Uses barriers that the kernel has anyway.
struct AddOrder {
    int* added_tiles;  // of the query tile; null: in any order

    /// Thread 0, before a barrier behind which all threads may add: waits for `before` key tiles.
    __device__ __forceinline__ void wait(int before) const {
        if (added_tiles == nullptr || threadIdx.x != 0) return;
        int added;
        do {
            asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(added) : "l"(added_tiles));
        } while (added < before);
        fence();
    }

    /// All threads that have added, before a barrier ...
    __device__ __forceinline__ void publish() const {
        if (added_tiles != nullptr) fence();
    }

    /// ... and behind it: the next thread block may add.
    __device__ __forceinline__ void let_next() const {
        if (added_tiles != nullptr && threadIdx.x == 0) atomicAdd(added_tiles, 1);
    }

private:
    __device__ static void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
};

}  // namespace lemo::cuda::segment_attention::portable
