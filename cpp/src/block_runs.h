// Consecutive blocks that products of the CPU kernels cover at a time.
#pragma once

#include <cstdint>
#include <vector>

namespace lemo::cpu {

struct BlockRun {
    int64_t first, end;    // blocks
    int64_t sequence_end;  // the end of their sequence's blocks
};

/// Cuts the blocks of each sequence into runs: as many as have at most `rows` rows together, or one
/// larger block.
inline std::vector<BlockRun> cut_runs(const int32_t* block_starts, const int32_t* cu_blocks,
                                      int64_t num_sequences, int64_t rows) {
    std::vector<BlockRun> runs;
    for (int64_t n = 0; n < num_sequences; ++n) {
        const int64_t sequence_end = cu_blocks[n + 1];
        for (int64_t block = cu_blocks[n]; block < sequence_end;) {
            BlockRun run{block, block + 1, sequence_end};
            while (run.end < sequence_end &&
                   block_starts[run.end + 1] - block_starts[block] <= rows) {
                ++run.end;
            }
            block = run.end;
            runs.push_back(run);
        }
    }
    return runs;
}

}  // namespace lemo::cpu
