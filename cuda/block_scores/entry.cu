// block_scores on CUDA: what is supported, and which tier runs. One pass over tiles of queries
// and keys, summed over heads in registers; nothing of size T x T, nor B x B, exists.
#include "lemo/block_scores.h"

#include "block_scores/hopper/kernel.h"
#include "block_scores/portable/kernel.h"
#include "common/head_support.h"
#include "common/hopper_support.h"

namespace lemo {
namespace {

constexpr const char* kOp = "block_scores";

bool takes_hopper(const BlockScoresParams& params) {
    const auto got = [&] { return quoted(params.kernel); };
    const Checker check(kOp);
    check.that(params.kernel == "auto" || params.kernel == "portable" || params.kernel == "hopper",
               "kernel", "one of 'auto', 'portable', 'hopper' on CUDA", got);
    if (params.kernel == "portable") return false;
    const bool supported = cuda::supports_hopper_kernels(kOp);
    check.that(supported || params.kernel == "auto", "kernel",
               "'auto' or 'portable' on this GPU with this build", got, ErrorKind::kUnsupported);
    return supported;
}

}  // namespace

int64_t block_scores_scratch_bytes(const BlockScoresParams& params) {
    return cuda::count_scratch_bytes<cuda::block_scores::ScoresScratch>(params);
}

void block_scores_cuda(const BlockScoresParams& params, void* cuda_stream) {
    using namespace cuda::block_scores;
    cuda::check_small_heads(Checker(kOp), params.q, params.k);
    const bool hopper_tier = takes_hopper(params);
    const int64_t blocks = params.scores.size(0), sequences = params.cu_blocks.size(0) - 1;
    if (blocks == 0) return;
    cuda::Arena arena(params.scratch);
    const auto count = [](int64_t value) { return static_cast<int>(value); };
    const ScoresArguments args{params.q.data,
                               params.k.data,
                               params.block_starts.as<const int32_t>(),
                               params.cu_blocks.as<const int32_t>(),
                               count(sequences),
                               count(blocks),
                               count(params.q.size(1)),
                               count(params.k.size(1)),
                               count(params.q.size(2)),
                               count(max_parts(params)),
                               ScoresScratch(params, arena)};
    const auto stream = static_cast<cudaStream_t>(cuda_stream);
    launch_plan(args, stream);
    if (hopper_tier) {
#ifdef LEMO_WITH_HOPPER
        hopper::launch(args, params, stream);
#endif
    } else {
        portable::launch(args, params.q.dtype, stream);
    }
    const auto scale = static_cast<float>(params.scale / static_cast<double>(args.heads));
    launch_mean(args, scale, params.scores.as<float>(), stream);
}

}  // namespace lemo
