// How thread blocks add to the gradient of the queries, and in which order.
#pragma once

#include "segment_attention/backward_traits.h"

namespace lemo::cuda {

/// Where the accumulators of a query tile lie in scratch. Neighbouring threads are neighbours in
/// memory, so a warp adds whole sectors; compute capability 9.0 adds four floats at once.
template <typename Traits>
struct DqSums {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    static constexpr int kVector = 4;
#else
    static constexpr int kVector = 1;
#endif
    float* first;

    __device__ DqSums(const BackwardArguments& args, int head, int packed_tile)
        : first(args.dq_sums + (int64_t{head} * args.plan.max_q_tiles + packed_tile) *
                                   Traits::kBlockM * Traits::kHeadDim) {}

    /// Adds part `part` of `parts`.
    template <typename Accumulators>
    __device__ __forceinline__ void add(const Accumulators& sums, int part, int parts) const {
        const int count = Traits::kSumsPerThread / parts;
        CUTE_UNROLL
        for (int i = part * count; i < (part + 1) * count; i += kVector) {
            float* to = first + i * Traits::kThreads + threadIdx.x * kVector;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
            // atomicAdd of a float4 would also fetch what was there.
            asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to),
                         "f"(sums(i)), "f"(sums(i + 1)), "f"(sums(i + 2)), "f"(sums(i + 3))
                         : "memory");
#else
            atomicAdd(to, sums(i));
#endif
        }
    }

    template <typename Accumulators>
    __device__ __forceinline__ void read(Accumulators& sums) const {
        CUTE_UNROLL
        for (int i = 0; i < Traits::kSumsPerThread; i += kVector) {
            const float* from = first + i * Traits::kThreads + threadIdx.x * kVector;
            CUTE_UNROLL
            for (int j = 0; j < kVector; ++j) sums(i + j) = from[j];
        }
    }
};

/// The turn of this thread block among those that add to a query tile. Waiting and passing on
/// ride on barriers that the kernel has anyway.
struct Turn {
    int* counter;  // null: in any order

    /// Thread 0, before a barrier behind which everyone may add.
    __device__ __forceinline__ void wait(int turn) const {
        if (counter == nullptr || threadIdx.x != 0) return;
        int finished;
        do {
            asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(finished) : "l"(counter));
        } while (finished < turn);
        fence();
    }

    /// Everyone who has added, before a barrier ...
    __device__ __forceinline__ void publish() const {
        if (counter != nullptr) fence();
    }

    /// ... and behind it: the next block may add.
    __device__ __forceinline__ void pass_on() const {
        if (counter != nullptr && threadIdx.x == 0) atomicAdd(counter, 1);
    }

private:
    __device__ static void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
};

}  // namespace lemo::cuda
