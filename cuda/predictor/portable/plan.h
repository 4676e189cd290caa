// What the kernels of predictor share: sizes, and where everything lies in the scratch of a call.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>

#include "common/arena.h"
#include "common/cublas.h"
#include "common/vector.h"
#include "lemo/blocks.h"
#include "lemo/predictor.h"

namespace lemo::cuda::predictor::portable {

// Rows of a tile of the fused kernel. A block's sum of activations comes from the tiles of
// rows that it meets, added in their order.
inline constexpr int kTileRows = 128;
// Both hidden layers of the fused kernel have at most this many units.
inline constexpr int64_t kFusedWidth = 256;
// Rows whose activations exist at a time where cuBLAS computes them: a multiple of kTileRows.
inline constexpr int64_t kChunkRows = 8192;
// Rows of operands begin at multiples of 16 bytes.
inline constexpr int64_t kPieceElements = 8;

/// One predictor: f(x) = up relu(mid relu(down x)).
struct Net {
    int64_t first = 0, second = 0, output = 0;  // R1, R2, E
    Tensor up;
    // down [R1, H] and mid [R2, R1] in x's dtype; mid's rows are `stride` elements apart.
    const void* down = nullptr;
    const void* mid = nullptr;
    int64_t stride = 0;
    float* sums = nullptr;     // [B + tiles, R2]: place b + t is the share of tile t of block b
    float* means = nullptr;    // [B, R2]
    float* visible = nullptr;  // [B, R2], queries: means of `means` over the blocks from there on
};

/// A matrix to copy into another dtype and stride; what lies behind a row's end becomes 0.
struct Repack {
    Tensor from;  // [rows, columns]
    void* to = nullptr;
    int64_t stride = 0;
};

struct PredictorPlan {
    Tensor x, block_starts, cu_blocks;
    int64_t tokens, hidden, blocks, sequences, tiles;
    int num_nets = 1;  // keys, then queries
    Net nets[2];
    int num_repacks = 0;
    Repack repacks[4];
    bool fused;
    // Activations of one chunk of rows.
    int64_t first_stride = 0;  // elements of a row of `first`
    void* first = nullptr;     // [chunk, R1] in x's dtype
    float* second = nullptr;   // [chunk, R2], before its ReLU
    GemmWorkspace gemm;

    /// `by_cublas`: whether cuBLAS computes activations even where the fused kernel fits.
    PredictorPlan(const PredictorParams& params, Arena& arena, bool by_cublas)
        : x(params.x), block_starts(params.block_starts), cu_blocks(params.cu_blocks),
          tokens(params.x.size(0)), hidden(params.x.size(1)),
          blocks(params.block_starts.size(0) - 1), sequences(params.cu_blocks.size(0) - 1),
          tiles(ceil_div<int64_t>(tokens, kTileRows)),
          fused(x.dtype != DType::kFloat32 && hidden % kPieceElements == 0) {
        add(params.key, arena);
        if (params.query.down) {
            num_nets = 2;
            add(params.query, arena);
        }
        int64_t most_first = 0, most_second = 0;
        for (int n = 0; n < num_nets; ++n) {
            most_first = std::max(most_first, nets[n].stride);
            most_second = std::max(most_second, nets[n].second);
        }
        fused = fused && std::max(most_first, most_second) <= kFusedWidth;
        if (fused && !by_cublas) return;
        const int64_t rows = std::min(tokens, kChunkRows);
        first_stride = most_first;
        first = arena.take<float>(rows * most_first);  // room for either dtype
        second = arena.take<float>(rows * most_second);
        gemm = {arena.take<std::byte>(kGemmWorkspaceBytes), kGemmWorkspaceBytes};
    }

private:
    void add(const PredictorWeights& weights, Arena& arena) {
        Net& net = nets[num_nets - 1];
        net.first = weights.down.size(0);
        net.second = weights.mid.size(0);
        net.output = weights.up.size(0);
        net.up = weights.up;
        net.stride = round_up(net.first, kPieceElements);
        // 2 or 4 bytes an element: room for either.
        if (weights.down.dtype == x.dtype) {
            net.down = weights.down.data;
        } else {
            void* down = arena.take<float>(net.first * hidden);
            repacks[num_repacks++] = {weights.down, down, hidden};
            net.down = down;
        }
        void* mid = arena.take<float>(net.second * net.stride);
        repacks[num_repacks++] = {weights.mid, mid, net.stride};
        net.mid = mid;
        net.sums = arena.take<float>((blocks + tiles) * net.second);
        net.means = arena.take<float>(blocks * net.second);
        if (num_nets == 2) net.visible = arena.take<float>(blocks * net.second);
    }
};

/// Weights in x's dtype, where they have another or their rows are not aligned.
void repack(const char* op, const PredictorPlan& plan, cudaStream_t stream);

/// `first` = relu(x down^T) and `second` = first mid^T of rows [row, row + rows), by cuBLAS.
void activate(const char* op, const PredictorPlan& plan, const Net& net, int64_t row, int64_t rows,
              cudaStream_t stream);

/// Means of the second activations over blocks (`means`, `visible`), of every net.
void mean_activations(const char* op, const PredictorPlan& plan, cudaStream_t stream);

/// mean_activations by the fused kernel up to the `sums`.
void fused_sums(const char* op, const PredictorPlan& plan, cudaStream_t stream);

}  // namespace lemo::cuda::predictor::portable
