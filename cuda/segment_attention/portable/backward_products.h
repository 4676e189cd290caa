// What the main backward kernel computes of one tile of queries and one of keys: mma of a whole
// thread block, and what each thread does with its accumulators in between.
#pragma once

#include <cmath>

#include "common/exp2.h"
#include "segment_attention/portable/backward_tiles.h"
#include "segment_attention/portable/score_tile.h"

namespace lemo::cuda::segment_attention::portable {

/// [queries, keys] = queries * keys^T: of Q and K the scores, of dO and V the gradients of the
/// probabilities. Both stay in registers, at the same places.
template <typename Traits, typename Queries, typename Keys>
__device__ __forceinline__ auto query_key_products(const Queries& queries, const Keys& keys) {
    using Load = LoadFragment<typename Traits::Element>;
    typename Traits::ScoreMma mma;
    auto products = cute::partition_fragment_C(mma, TileShape<Traits::kBlockM, Traits::kBlockN>{});
    cute::clear(products);
    tile_mma(mma, left_operand(Load{}, mma, queries), right_operand(Load{}, mma, keys), products);
    return products;
}

/// sums [keys, columns] += scores^T * queries: of P and dO it is dv, of dS and Q it is dk.
/// `meanwhile`: see tile_mma.
template <typename Traits, typename Scores, typename Queries, typename Sums,
          typename Meanwhile = Nothing>
__device__ __forceinline__ void add_key_products(const Scores& scores, const Queries& queries,
                                                 Sums& sums, Meanwhile meanwhile = {}) {
    using Load = LoadFragmentTransposed<typename Traits::Element>;
    typename Traits::KeyMma mma;
    tile_mma(mma, left_operand(Load{}, mma, transposed(scores)),
             right_operand(Load{}, mma, transposed(queries)), sums, meanwhile);
}

/// [queries, columns] = dS * K: what these keys add to dq.
template <typename Traits, typename Gradients, typename Keys>
__device__ __forceinline__ auto query_gradient(const Gradients& ds, const Keys& k) {
    using Element = typename Traits::Element;
    typename Traits::QueryMma mma;
    auto dq = cute::partition_fragment_C(mma, TileShape<Traits::kBlockM, Traits::kHeadDim>{});
    cute::clear(dq);
    tile_mma(mma, left_operand(LoadFragment<Element>{}, mma, ds),
             right_operand(LoadFragmentTransposed<Element>{}, mma, transposed(k)), dq);
    return dq;
}

/// The statistics of the rows that a thread has accumulators of, read from shared memory when they
/// are needed: there are no registers to keep them in.
template <typename Traits, typename Places>
struct RowStatistics {
    const float2* buffers;
    const int& buffer;
    const Places& where;

    __device__ __forceinline__ float log2_sum(int r) const { return of_row(r).x; }
    __device__ __forceinline__ float delta(int r) const { return of_row(r).y; }

private:
    __device__ float2 of_row(int r) const {
        return buffers[buffer * Traits::kBlockM + cute::get<0>(where(r, _0{}))];
    }
};

/// The mathematics of a tile of scores, in place. Without a softcap scores become probabilities at
/// once. With one they become its tanh, whose slope the gradient needs, and probabilities only when
/// the gradient is there: it takes no more registers.
template <typename Traits>
struct BackwardScores {
    static constexpr bool kCapped = Traits::kCapped;
    /// Of a key that the query does not see, before `differentiate`.
    static constexpr float kHidden = kCapped ? kHiddenTanh : 0.0f;
    const ScoreSettings& settings;
    float scale_log2;  // of the scores, or of the tanh, in the exponent of 2

    __device__ __forceinline__ explicit BackwardScores(const ScoreSettings& score)
        : settings(score),
          scale_log2((kCapped ? score.softmax_scale : score.scale) * float(M_LOG2E)) {}

    /// q . k becomes the probability, or the tanh.
    template <typename Accumulators, typename Statistics>
    __device__ __forceinline__ void activate(Accumulators& scores,
                                             const Statistics& statistics) const {
        if constexpr (kCapped) {
            take_tanh(scores, settings.tanh_factor);
        } else {
            auto rows = by_row_and_column(scores);
            CUTE_UNROLL
            for (int r = 0; r < cute::size<0>(rows); ++r) {
                const float log2_sum = statistics.log2_sum(r);
                CUTE_UNROLL
                for (int c = 0; c < cute::size<1>(rows); ++c) {
                    rows(r, c) = exp2_approximate(fmaf(rows(r, c), scale_log2, -log2_sum));
                }
            }
        }
    }

    /// `gradients` are those of the probabilities and become those of the scores, before their
    /// scale. `scores`, as `activate` and the mask have left them, are probabilities afterwards.
    template <typename Accumulators, typename Statistics>
    __device__ __forceinline__ void differentiate(Accumulators& scores, Accumulators& gradients,
                                                  const Statistics& statistics) const {
        auto score_rows = by_row_and_column(scores);
        auto gradient_rows = by_row_and_column(gradients);
        CUTE_UNROLL
        for (int r = 0; r < cute::size<0>(score_rows); ++r) {
            const float delta = statistics.delta(r);
            if constexpr (kCapped) {
                const float log2_sum = statistics.log2_sum(r);
                CUTE_UNROLL
                for (int c = 0; c < cute::size<1>(score_rows); ++c) {
                    const float tanh = score_rows(r, c);
                    const float probability =
                        tanh == kHiddenTanh ? 0.0f
                                            : exp2_approximate(fmaf(tanh, scale_log2, -log2_sum));
                    score_rows(r, c) = probability;
                    gradient_rows(r, c) =
                        probability * (gradient_rows(r, c) - delta) * fmaf(-tanh, tanh, 1.0f);
                }
            } else {
                CUTE_UNROLL
                for (int c = 0; c < cute::size<1>(score_rows); ++c) {
                    gradient_rows(r, c) = score_rows(r, c) * (gradient_rows(r, c) - delta);
                }
            }
        }
    }
};

}  // namespace lemo::cuda::segment_attention::portable
