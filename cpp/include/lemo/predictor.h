// predictor: low-rank maps of each token -> one vector for each block -> scores of blocks.
#pragma once

#include <cstdint>

#include "lemo/tensor.h"

namespace lemo {

/// f(x) = up relu(mid relu(down x)); each map as nn.Linear stores it, [out, in], no bias.
struct PredictorWeights {
    Tensor down;  // [R1, H] float
    Tensor mid;   // [R2, R1] float
    Tensor up;    // [E, R2] float
};

/// k_n and q_m are the means of f over the tokens of a block. With a query predictor score[n] =
/// k_n . mean of q_m over the blocks m >= n of the sequence; without one E = 1 and score[n] = k_n.
struct PredictorParams {
    Tensor x;  // [T, H] float
    PredictorWeights key;
    PredictorWeights query;  // all three absent, or of the key's E
    Tensor block_starts;     // [B+1] int32
    Tensor cu_blocks;        // [N+1] int32
    Tensor scores;           // [B] float32, written
    // On a GPU: predictor_scratch_bytes bytes of its memory, from a 256-byte boundary on.
    void* scratch = nullptr;
};

struct PredictorBackwardParams {
    Tensor dscores;           // [B] float32
    PredictorParams forward;  // `scores` is absent
    PredictorWeights dkey;    // float32 gradients of the weights' shapes, written
    PredictorWeights dquery;  // absent where the query predictor is
    void* scratch = nullptr;  // likewise; that of `forward` is not used
};

void check(const PredictorParams& params);
void check(const PredictorBackwardParams& params);

void predictor_cpu(const PredictorParams& params);
void predictor_backward_cpu(const PredictorBackwardParams& params);

/// On CUDA products take both operands in x's dtype: weights of another are rounded to it, and so
/// are the activations between two maps (and their gradients, backward). Sums, means over blocks,
/// the last map, scores and gradients of weights are float32. bfloat16 and float16 x with a hidden
/// size of a multiple of 8 and up to 256 units a hidden layer take one fused kernel forward;
/// everything else, and backward, takes cuBLAS in chunks of rows. x and the first maps lie at
/// multiples of 16 bytes.
void predictor_cuda(const PredictorParams& params, void* stream);
void predictor_backward_cuda(const PredictorBackwardParams& params, void* stream);

/// Scratch of a call on CUDA; `scratch` itself is not looked at.
int64_t predictor_scratch_bytes(const PredictorParams& params);
int64_t predictor_scratch_bytes(const PredictorBackwardParams& params);

}  // namespace lemo
