// Grouping of blocks into tiles of rows, on the device: their places are unknown to the host.
#pragma once

#include <cstdint>

namespace lemo::cuda {

/// Cuts the blocks of every sequence into tiles of whole blocks of at most `rows` rows, or one
/// larger block. Writes the first block of every tile, then the number of blocks, into `first`
/// [B+1], and returns the number of tiles. Serial: for one thread, a few cycles a block.
__device__ inline int cut_tiles(const int32_t* block_starts, const int32_t* cu_blocks,
                                int num_sequences, int rows, int32_t* first) {
    int tiles = 0;
    for (int n = 0; n < num_sequences; ++n) {
        const int end = cu_blocks[n + 1];
        for (int block = cu_blocks[n]; block < end;) {
            first[tiles++] = block;
            const int start = block_starts[block];
            do {
                ++block;
            } while (block < end && block_starts[block + 1] - start <= rows);
        }
    }
    first[tiles] = cu_blocks[num_sequences];
    return tiles;
}

}  // namespace lemo::cuda
