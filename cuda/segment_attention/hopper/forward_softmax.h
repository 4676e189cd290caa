// The softmax of the forward kernel: masks, running maxima and sums of a thread's two rows.
#pragma once

#include <cmath>

#include "segment_attention/elementwise.h"
#include "segment_attention/hopper/forward_work.h"
#include "segment_attention/hopper/fragments.h"

namespace lemo::cuda::hopper {

/// The keys that the two rows of a thread see, and which tiles of keys need a look at them.
template <typename Traits>
struct ForwardMask {
    int2 seen[kThreadRows];
    int n_all_begin;  // tiles from here on, and below n_all_end, are seen whole by all rows of the
    int n_all_end;    // warpgroup

    __device__ ForwardMask(const ForwardArguments& args, const ForwardWork& work, int warpgroup) {
        const VisibleKeys visible(args.plan, work.tile, work.head, args.num_heads);
        const int first = work.m_first + warpgroup * 64;
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) seen[r] = visible(first + thread_row() + 8 * r);
        // Both ends of what a query sees grow with it.
        n_all_begin = ceil_div(visible(first + 63).x, Traits::kBlockN);
        n_all_end = visible(first).y / Traits::kBlockN;
    }

    template <typename Scores>
    __device__ __forceinline__ void apply(Scores& scores, int n_tile) const {
        const int key = n_tile * Traits::kBlockN + thread_column();
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
            CUTE_UNROLL
            for (int e = 0; e < kRowElements<Traits::kBlockN>; ++e) {
                const int at = key + element_column(e);
                if (at < seen[r].x || at >= seen[r].y) scores(element_index(r, e)) = -INFINITY;
            }
        }
    }
};

/// Running maximum and sum of the exponentials of a thread's rows.
struct ForwardSoftmax {
    float scale_log2;
    float max[kThreadRows] = {-INFINITY, -INFINITY};
    float sum[kThreadRows] = {0, 0};  // of this thread's columns

    __device__ explicit ForwardSoftmax(float scale)
        // A scale of 0 would make NaN of masked scores; the smallest number does the same otherwise.
        : scale_log2(fmaxf(fabsf(scale) * float(M_LOG2E), 1.2e-38f)) {}

    /// Turns scores of [64, kColumns] into exp2(scale * score - scale * max). Returns by what sums
    /// and output so far have to be multiplied. `kMasked`: a row may have seen no key yet.
    template <int kColumns, bool kMasked, typename Scores>
    __device__ __forceinline__ float2 update(Scores& scores) {
        float factors[kThreadRows];
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
            // Two chains, since each maximum waits for the one before.
            float highest = max[r], other = scores(element_index(r, 1));
            CUTE_UNROLL
            for (int e = 0; e < kRowElements<kColumns>; e += 2) {
                highest = fmaxf(highest, scores(element_index(r, e)));
                other = fmaxf(other, scores(element_index(r, e + 1)));
            }
            highest = fmaxf(highest, other);
            // The four lanes of a quad hold one row.
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            // -inf - (-inf) would be NaN.
            const float shift =
                kMasked && highest == -INFINITY ? 0.0f : highest * scale_log2;
            factors[r] = exp2_approx(fmaf(max[r], scale_log2, -shift));
            max[r] = highest;
            float even = 0, odd = 0;
            CUTE_UNROLL
            for (int e = 0; e < kRowElements<kColumns>; e += 2) {
                float& first = scores(element_index(r, e));
                float& second = scores(element_index(r, e + 1));
                first = exp2_approx(fmaf(first, scale_log2, -shift));
                second = exp2_approx(fmaf(second, scale_log2, -shift));
                even += first;
                odd += second;
            }
            sum[r] = fmaf(sum[r], factors[r], even + odd);
        }
        return make_float2(factors[0], factors[1]);
    }

    /// Adds up the parts of a row that lie in different lanes.
    __device__ __forceinline__ void finish() {
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        }
    }
};

/// Multiplies the two rows of a thread's output [64, kColumns].
template <int kColumns, typename Output>
__device__ __forceinline__ void scale_rows(Output& output, float2 factors) {
    CUTE_UNROLL
    for (int e = 0; e < kRowElements<kColumns>; ++e) {
        output(element_index(0, e)) *= factors.x;
        output(element_index(1, e)) *= factors.y;
    }
}

}  // namespace lemo::cuda::hopper
