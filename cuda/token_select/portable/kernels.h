// The kernels of token_select.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lemo::cuda::token_select::portable {

struct SelectArguments {
    const float* scores;
    const int32_t* block_starts;
    const int32_t* cu_blocks;
    bool is_ratio;
    double value;
    int64_t keep_first, keep_last;
    int2* places;
    int32_t* cu_kept;  // entry n + 1 gets the count of sequence n; scan_kernel adds them up
    int32_t* cu_rows;
    int64_t* counts;
};

/// Chooses the blocks of every sequence.
void launch_select(const SelectArguments& args, int64_t num_sequences, cudaStream_t stream);

struct RowsArguments {
    const int32_t* block_starts;
    const int32_t* cu_blocks;
    const int2* places;
    const int32_t* cu_kept;
    const int32_t* cu_rows;
    int64_t num_blocks, num_sequences, num_kept, num_rows;
    int32_t* kept_blocks;
    int32_t* rows;
    int32_t* positions;
};

/// Lists the chosen blocks and their rows.
void launch_rows(const RowsArguments& args, cudaStream_t stream);

}  // namespace lemo::cuda::token_select::portable
