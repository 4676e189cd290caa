// predictor: low-rank maps of each token -> one vector for each block -> scores of blocks.
#pragma once

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
    Tensor x;                // [T, H] float
    PredictorWeights key;
    PredictorWeights query;  // all three absent, or of the key's E
    Tensor block_starts;     // [B+1] int32
    Tensor cu_blocks;        // [N+1] int32
    Tensor scores;           // [B] float32, written
};

struct PredictorBackwardParams {
    Tensor dscores;           // [B] float32
    PredictorParams forward;  // `scores` is absent
    PredictorWeights dkey;    // float32 gradients of the weights' shapes, written
    PredictorWeights dquery;  // absent where the query predictor is
};

void check(const PredictorParams& params);
void check(const PredictorBackwardParams& params);

void predictor_cpu(const PredictorParams& params);
void predictor_backward_cpu(const PredictorBackwardParams& params);

}  // namespace lemo
