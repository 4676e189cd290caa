// token_select on CUDA. One tier, which takes everything that `check` lets through.
#include "lemo/token_select.h"

#include "token_select/portable/kernels.h"

namespace lemo {

using namespace cuda::token_select::portable;

void token_select_cuda(const TokenSelectParams& params, void* stream) {
    const int64_t num_sequences = params.cu_blocks.size(0) - 1;
    const SelectArguments args{params.scores.as<const float>(),
                               params.block_starts.as<const int32_t>(),
                               params.cu_blocks.as<const int32_t>(),
                               params.policy == "ratio",
                               params.value,
                               params.keep_first,
                               params.keep_last,
                               params.places.as<int2>(),
                               params.cu_kept.as<int32_t>(),
                               params.cu_rows.as<int32_t>(),
                               params.counts.as<int64_t>()};
    launch_select(args, num_sequences, static_cast<cudaStream_t>(stream));
}

void token_rows_cuda(const TokenRowsParams& params, void* stream) {
    const RowsArguments args{params.block_starts.as<const int32_t>(),
                             params.cu_blocks.as<const int32_t>(),
                             params.places.as<const int2>(),
                             params.cu_kept.as<const int32_t>(),
                             params.cu_rows.as<const int32_t>(),
                             params.block_starts.size(0) - 1,
                             params.cu_blocks.size(0) - 1,
                             params.kept_blocks.size(0),
                             params.rows.size(0),
                             params.kept_blocks.as<int32_t>(),
                             params.rows.as<int32_t>(),
                             params.positions.as<int32_t>()};
    launch_rows(args, static_cast<cudaStream_t>(stream));
}

}  // namespace lemo
