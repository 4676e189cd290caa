// Instructions of compute capability 9.0: barriers in shared memory, bulk and tensor copies that
// complete on them, and the mma of whole warpgroups (wgmma) through CuTe's atoms. Also what limits
// a kernel that specialises its warps: registers, named barriers and shared memory.
//
// Only files that are compiled for sm_90a include this.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

// An mma of 8, 16, 24, ... columns, not of powers of two only.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/algorithm/gemm.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <cutlass/arch/reg_reconfig.h>

#include "common/tensor_map.h"

namespace lemo::cuda {

inline constexpr int kWarpgroupThreads = 128;

// --- what a thread block has ---------------------------------------------------------------------

/// Registers of a thread in the producer warpgroup and in each of the consumer warpgroups, as the
/// warpgroups set them once they know their roles.
template <int kProducer_, int kConsumer_, int kConsumers>
struct RegisterBudget {
    static constexpr int kProducer = kProducer_, kConsumer = kConsumer_;
    static_assert(kProducer % 8 == 0 && kConsumer % 8 == 0,
                  "setmaxnreg takes registers in steps of eight");
    static_assert(kProducer >= 24 && kConsumer <= 240, "setmaxnreg takes 24 to 240 registers");
    static_assert((kProducer + kConsumers * kConsumer) * kWarpgroupThreads <= 65536,
                  "all warpgroups together have the 65536 registers of a multiprocessor");
};

/// The most shared memory of a thread block.
inline constexpr int kMaxSharedBytes = 227 * 1024;

/// Named barriers of a thread block; number 0 is __syncthreads().
inline constexpr int kNamedBarriers = 16;

// --- barriers ------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// A barrier in shared memory (mbarrier): a phase ends when all arrivals and all announced bytes
/// are there. Whoever waits names the parity of the phase; the phases begin with parity 0, and a
/// barrier that nobody has used answers to parity 1 at once.
///
/// Who reads or writes a buffer by loads and stores of its own arrives for itself: every lane's are
/// then ordered by its own arrival, whatever __syncwarp orders, and racecheck, which credits an
/// arrival to the lane that makes it, can follow. Where only an mma reads, one lane of a warp
/// arrives for all.
class Barrier {
public:
    __device__ __forceinline__ void init(int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state_)),
                     "r"(arrivals)
                     : "memory");
    }

    /// One arrival for this thread.
    __device__ __forceinline__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state_))
                     : "memory");
    }

    /// One arrival for the whole warp, behind the mmas that it waited for.
    __device__ __forceinline__ void arrive_warp() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive();
    }

    /// Arrives, and announces bytes that copies will bring.
    __device__ __forceinline__ void arrive_expecting(int bytes) {
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state_)),
            "r"(bytes)
            : "memory");
    }

    __device__ __forceinline__ void wait(uint32_t parity) {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "wait:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@done bra end;\n"
            "bra wait;\n"
            "end:\n"
            "}" ::"r"(shared_address(&state_)),
            "r"(parity)
            : "memory");
    }

    __device__ __forceinline__ uint32_t address() const { return shared_address(&state_); }

private:
    uint64_t state_;
};

/// Makes initialised barriers visible to copies; before the __syncthreads() that shows them to all.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// What this thread wrote to shared memory can be read by wgmma and bulk copies that start behind a
/// barrier.
__device__ __forceinline__ void publish_shared_writes() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Position in a ring of kStages buffers.
template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;  // of the phase in which the buffer at `stage` is filled

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/// A barrier among `threads` threads of a thread block, by number (below kNamedBarriers).
__device__ __forceinline__ void sync_named(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// Counts as arrived there without waiting.
__device__ __forceinline__ void arrive_named(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// Tells the compiler that all lanes of a warp hold the same value, so that what follows from it -
/// addresses of operands, branches - takes neither vector registers nor care for divergence.
__device__ __forceinline__ int warp_uniform(int value) {
    return __shfl_sync(0xffffffffu, value, 0);
}

// --- copies --------------------------------------------------------------------------------------

/// Copies one box to `to`; its bytes count for `barrier`.
__device__ __forceinline__ void copy_box(const CUtensorMap& map, Barrier& barrier, void* to,
                                         int column, int head, int row) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(barrier.address()), "r"(column), "r"(head), "r"(row)
        : "memory");
}

/// Copies `bytes` (a multiple of 16) to shared memory; they count for `barrier`.
__device__ __forceinline__ void copy_bytes(const void* from, Barrier& barrier, void* to,
                                           int bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(barrier.address())
        : "memory");
}

/// Adds `bytes` of floats in shared memory to those at `to`, in the background.
__device__ __forceinline__ void add_floats(float* to, const void* from, int bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
        "r"(shared_address(from)), "r"(bytes)
        : "memory");
}

/// Adds four floats of this thread's to those at `to`, in one access of 16 bytes.
__device__ __forceinline__ void add_vector(float* to, float a, float b, float c, float d) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a),
                 "f"(b), "f"(c), "f"(d)
                 : "memory");
}

/// Waits until the counter at `from`, which other thread blocks add to, is `count` at least. What
/// they did before their fence and their addition is done then. For whole warps, which leave
/// together: barriers that follow count a warp once.
__device__ __forceinline__ void wait_for_count(const int* from, int count) {
    asm volatile(
        "{\n"
        ".reg .pred less;\n"
        ".reg .s32 found;\n"
        "wait:\n"
        "ld.acquire.gpu.global.s32 found, [%0];\n"
        "setp.lt.s32 less, found, %1;\n"
        "vote.sync.any.pred less, less, 0xffffffff;\n"
        "@less bra.uni wait;\n"
        "}" ::"l"(from),
        "r"(count)
        : "memory");
}

/// Closes a group of this thread's add_floats.
__device__ __forceinline__ void commit_adds() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Waits until all but the last `pending` groups no longer need their shared memory.
template <int pending>
__device__ __forceinline__ void wait_adds_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

/// Waits until all but the last `pending` groups have been added.
template <int pending>
__device__ __forceinline__ void wait_adds() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

/// Writes four 8 x 8 matrices of 2-byte elements: lane l gives the address of row l % 8 of matrix
/// l / 8 and holds elements 2 * (l % 4), + 1 of row l / 4 of each.
__device__ __forceinline__ void store_matrices(void* row, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
    asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/// The same with every matrix transposed on its way.
__device__ __forceinline__ void store_matrices_transposed(void* row, uint32_t a, uint32_t b,
                                                          uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.x4.trans.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// --- mma of warpgroups ---------------------------------------------------------------------------

/// A tile of rows in shared memory as copy_box leaves it: columns of 64 elements one after the
/// other, each of swizzled rows of 128 bytes. As an operand whose dot products run along the rows.
template <typename Element, int kRows, int kColumns>
using SwizzledRows =
    decltype(cute::tile_to_shape(cute::SM90::GMMA::Layout_K_SW128_Atom<Element>{},
                                 cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{}));

/// The same memory as [columns, rows]: an operand whose dot products run along the columns.
template <typename Element, int kRows, int kColumns>
using SwizzledColumns = decltype(cute::tile_to_shape(
    cute::SM90::GMMA::Layout_MN_SW128_Atom<Element>{},
    cute::Shape<cute::Int<kColumns>, cute::Int<kRows>>{}, cute::Step<cute::_2, cute::_1>{}));

/// Starts accumulators (+)= a b^T, in the background; `a` and `b` are fragments of `mma`, `a` in
/// shared memory or in registers. Neither may change before `wait_mmas` says that they were read.
template <bool kAccumulate, typename TiledMma, typename A, typename B, typename Accumulators>
__device__ __forceinline__ void start_mma(TiledMma& mma, const A& a, const B& b,
                                          Accumulators& accumulators) {
    constexpr bool kRegisters =
        !cute::is_base_of<cute::SM90::GMMA::DescriptorIterator, typename TiledMma::FrgTypeA>::value;
    if constexpr (kRegisters) cute::warpgroup_fence_operand(const_cast<A&>(a));
    cute::warpgroup_fence_operand(accumulators);
    cute::warpgroup_arrive();
    mma.accumulate_ =
        kAccumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int step = 0; step < cute::size<2>(a); ++step) {
        cute::gemm(mma, a(cute::_, cute::_, step), b(cute::_, cute::_, step), accumulators);
        mma.accumulate_ = cute::SM90::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_fence_operand(accumulators);
    if constexpr (kRegisters) cute::warpgroup_fence_operand(const_cast<A&>(a));
}

/// Waits until all but the last `pending` mmas of this warpgroup are done.
template <int pending>
__device__ __forceinline__ void wait_mmas() {
    cute::warpgroup_wait<pending>();
}

/// Accumulators of one mma as the left operand, in registers, of another one: a warpgroup holds
/// both in the same order. `rounded` are those of [64, kColumns], rounded to the element type.
template <int kColumns, typename Rounded>
__device__ __forceinline__ auto as_register_operand(Rounded& rounded) {
    using namespace cute;
    return make_tensor(rounded.data(),
                       Layout<Shape<Shape<_2, _2, _2>, _1, cute::Int<kColumns / 16>>,
                              Stride<Stride<_1, _2, _4>, _0, _8>>{});
}

}  // namespace lemo::cuda
