// What forward and backward do with a tile of scores [queries, keys], whose accumulators are spread
// over the registers of a thread block.
#pragma once

#include "common/exp2.h"
#include "segment_attention/plan.h"
#include "segment_attention/portable/tile_ops.h"

namespace lemo::cuda::segment_attention::portable {

/// The (row, column) within a [kRows, kColumns] tile of each accumulator of this thread, in the
/// order of `by_row_and_column`.
template <int kRows, int kColumns, typename TiledMma>
__device__ __forceinline__ auto accumulator_places(TiledMma tiled_mma) {
    return by_row_and_column(
        tiled_mma.get_thread_slice(threadIdx.x)
            .partition_C(cute::make_identity_tensor(TileShape<kRows, kColumns>{})));
}

/// Products q . k become the tanh of a softcap. `factor`: ScoreSettings::tanh_factor.
template <typename Accumulators>
__device__ __forceinline__ void take_tanh(Accumulators& scores, float factor) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) scores(i) = tanh_of_log2(scores(i) * factor);
}

/// Puts `hidden` in the place of the scores of keys that a query does not see. The tile begins with
/// query `m_first` and key `n_first` of the sequence.
template <typename Scores, typename Places>
__device__ __forceinline__ void hide_unseen(Scores& scores, const Places& where,
                                            const VisibleKeys& visible, int m_first, int n_first,
                                            float hidden) {
    using cute::get;
    CUTE_UNROLL
    for (int r = 0; r < cute::size<0>(scores); ++r) {
        const int2 seen = visible(m_first + get<0>(where(r, _0{})));
        CUTE_UNROLL
        for (int c = 0; c < cute::size<1>(scores); ++c) {
            const int key = n_first + get<1>(where(r, c));
            if (key < seen.x || key >= seen.y) scores(r, c) = hidden;
        }
    }
}

}  // namespace lemo::cuda::segment_attention::portable
