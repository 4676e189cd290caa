// The kernel of block_scores, Hopper tier: which warps do what.
//
// One thread block stays on each multiprocessor and takes pairs of 128 queries and 256 keys. Two
// consumer warpgroups multiply, head after head, 64 of the queries with half of the keys at a time,
// and add the positive results to sums in registers; while one adds, the other multiplies. The
// warps of a third warpgroup plan, copy, and add up what the consumers have found.
#include "block_scores/hopper/kernel.h"

#include <cstddef>

#include "block_scores/hopper/consumer.h"
#include "block_scores/hopper/producers.h"
#include "common/launch.h"

namespace lemo::cuda::block_scores::hopper {
namespace {

template <typename Traits>
__global__ void
__launch_bounds__(Traits::kThreads, 1)
hopper_scores_kernel(const __grid_constant__ HopperScoresArguments args) {
    extern __shared__ __align__(1024) std::byte shared_bytes[];
    auto& shared = *reinterpret_cast<ScoresShared<Traits>*>(shared_bytes);
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kCells; i += Traits::kThreads) {
        shared.cells[i / kCells][i % kCells] = 0;
    }
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    const int warp = warp_uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp < 4) {
        cutlass::arch::warpgroup_reg_dealloc<Traits::Registers::kProducer>();
        if (warp == 0) {
            if (threadIdx.x == 0) copy_tiles<Traits>(args, shared);
        } else if (warp == 1) {
            JobPlanner<Traits>(args.plan, shared).run();
        } else if (warp == 2) {
            sum_cells<Traits>(args.plan, shared);
        }
    } else {
        cutlass::arch::warpgroup_reg_alloc<Traits::Registers::kConsumer>();
        consume_scores<Traits>(args.plan, shared,
                        static_cast<int>(threadIdx.x) - kWarpgroupThreads);
    }
}

template <typename Element, int kHeadDim>
void launch_kernel(const ScoresArguments& args, const BlockScoresParams& params,
                   cudaStream_t stream) {
    using Traits = ScoresTraits<Element, kHeadDim>;
    constexpr const char* kOp = "block_scores";
    static_assert(sizeof(ScoresShared<Traits>) <= kMaxSharedBytes,
                  "all buffers fit into shared memory");
    const HopperScoresArguments hopper_args{
        make_tensor_map(kOp, params.q, kQueryRows),
        make_tensor_map(kOp, params.k, Traits::kMmaKeys), args};
    auto* kernel = hopper_scores_kernel<Traits>;
    reserve_shared_memory(kOp, kernel, sizeof(ScoresShared<Traits>));
    kernel<<<num_multiprocessors(kOp), Traits::kThreads, sizeof(ScoresShared<Traits>), stream>>>(
        hopper_args);
    check_launch(kOp);
}

}  // namespace

void launch(const ScoresArguments& args, const BlockScoresParams& params, cudaStream_t stream) {
    dispatch_half(params.q.dtype, [&]<typename Element>(Element) {
        if (args.head_dim <= 64) {
            launch_kernel<Element, 64>(args, params, stream);
        } else {
            launch_kernel<Element, 128>(args, params, stream);
        }
    });
}

}  // namespace lemo::cuda::block_scores::hopper
