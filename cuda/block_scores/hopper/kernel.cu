// The kernel of block_scores for compute capability 9.0.
//
// One thread block stays on each multiprocessor and takes pairs of 128 queries and 256 keys. Two
// consumer warpgroups multiply, head after head, 64 of the queries with half of the keys at a time,
// and add the positive products to sums in registers; while one adds, the other multiplies. The
// warps of a third warpgroup plan, copy, and add up what the consumers have found.
#include "block_scores/kernels.h"

#include <cstddef>

#include "block_scores/hopper/consumer.h"
#include "block_scores/hopper/producers.h"
#include "common/launch.h"

namespace lemo::block_scores {
namespace hopper {

template <typename Traits>
__device__ void init_shared(Shared<Traits>& shared) {
    constexpr int kConsumerThreads = cuda::kWarpgroupThreads * Traits::kConsumers;
    constexpr int kConsumerWarps = kConsumerThreads / 32;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kCells; i += Traits::kThreads) {
        shared.cells[i / kCells][i % kCells] = 0;
    }
    if (threadIdx.x > 0) return;
    for (int stage = 0; stage < Traits::kKeyStages; ++stage) {
        shared.keys_full[stage].init(1);
        shared.keys_empty[stage].init(kConsumerWarps);
    }
    for (int stage = 0; stage < Traits::kQueryStages; ++stage) {
        shared.queries_full[stage].init(1);
        shared.queries_empty[stage].init(kConsumerWarps);
    }
    for (int warpgroup = 0; warpgroup < Traits::kConsumers; ++warpgroup) {
        shared.turns[warpgroup].init(4);  // the warps of the other one
    }
    for (int stage = 0; stage < 2; ++stage) {
        shared.cells_full[stage].init(kConsumerThreads);
        shared.cells_empty[stage].init(32);
        shared.job_full[stage].init(32);
        // The consumers, the warp that adds up and the thread that copies.
        shared.job_empty[stage].init(kConsumerThreads + 32 + 1);
    }
    cuda::publish_barriers();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
hopper_kernel(const __grid_constant__ HopperArguments args) {
    extern __shared__ __align__(1024) std::byte shared_bytes[];
    auto& shared = *reinterpret_cast<Shared<Traits>*>(shared_bytes);
    init_shared(shared);
    __syncthreads();
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp < 4) {
        cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
        if (warp == 0) {
            if (threadIdx.x == 0) copy_tiles<Traits>(args, shared);
        } else if (warp == 1) {
            Planner<Traits>(args.plan, shared).run();
        } else if (warp == 2) {
            sum_cells<Traits>(args.plan, shared);
        }
    } else {
        cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
        consume<Traits>(args.plan, shared,
                        static_cast<int>(threadIdx.x) - cuda::kWarpgroupThreads);
    }
}

template <typename Element, int kHeadDim>
void launch(const Arguments& args, const BlockScoresParams& params, cudaStream_t stream) {
    using Traits = hopper::Traits<Element, kHeadDim>;
    constexpr const char* kOp = "block_scores";
    static_assert(sizeof(Shared<Traits>) <= 227 * 1024);
    const HopperArguments hopper_args{
        cuda::make_tensor_map(kOp, params.q, kQueryRows),
        cuda::make_tensor_map(kOp, params.k, Traits::kProductKeys), args};
    auto* kernel = hopper_kernel<Traits>;
    cuda::reserve_shared_memory(kOp, kernel, sizeof(Shared<Traits>));
    kernel<<<cuda::num_multiprocessors(kOp), Traits::kThreads, sizeof(Shared<Traits>), stream>>>(
        hopper_args);
    cuda::check_launch(kOp);
}

}  // namespace hopper

void launch_hopper(const Arguments& args, const BlockScoresParams& params, cudaStream_t stream) {
    const auto run = [&]<typename Element>(Element) {
        if (args.head_dim <= 64) {
            hopper::launch<Element, 64>(args, params, stream);
        } else {
            hopper::launch<Element, 128>(args, params, stream);
        }
    };
    if (params.q.dtype == DType::kBFloat16) {
        run(cutlass::bfloat16_t{});
    } else {
        run(cutlass::half_t{});
    }
}

}  // namespace lemo::block_scores
