// The softmax of the forward kernel: masks, running maxima and sums of a thread's two rows.
#pragma once

#include <cmath>

#include "common/exp2.h"
#include "segment_attention/hopper/forward_work.h"
#include "segment_attention/hopper/fragments.h"

namespace lemo::cuda::segment_attention::hopper {

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
        n_all_begin = warp_uniform(ceil_div(visible(first + 63).x, Traits::kBlockN));
        n_all_end = warp_uniform(visible(first).y / Traits::kBlockN);
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
    static constexpr float kMaxExcess = 8;  // log2
    float scale_log2;
    float max[kThreadRows] = {-INFINITY, -INFINITY};
    float sum[kThreadRows] = {0, 0};  // of this thread's columns

    __device__ explicit ForwardSoftmax(const ScoreSettings& score)
        // A scale of 0 would make NaN of masked scores; the smallest number is as good otherwise.
        : scale_log2(fmaxf(score.softmax_scale * float(M_LOG2E), 1.2e-38f)) {}

    /// Turns scores of [64, kColumns] into exp2(scale * score - scale * max). Returns by what the
    /// output so far has to be multiplied. `kMasked`: a row may have seen no key yet.
    template <int kColumns, bool kMasked, typename Scores>
    __device__ __forceinline__ float2 update(Scores& scores) {
        // Rows side by side, and each in two chains: an instruction waits for the one before it.
        float highest[kThreadRows], other[kThreadRows];
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
            highest[r] = max[r];
            other[r] = scores(element_index(r, 1));
        }
        CUTE_UNROLL
        for (int e = 0; e < kRowElements<kColumns>; e += 2) {
            CUTE_UNROLL
            for (int r = 0; r < kThreadRows; ++r) {
                highest[r] = fmaxf(highest[r], scores(element_index(r, e)));
                if (e > 0) other[r] = fmaxf(other[r], scores(element_index(r, e + 1)));
            }
        }
        float shift[kThreadRows], factors[kThreadRows];
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) highest[r] = fmaxf(highest[r], other[r]);
        // The four lanes of a quad hold one row.
        CUTE_UNROLL
        for (int lanes = 1; lanes <= 2; lanes *= 2) {
            CUTE_UNROLL
            for (int r = 0; r < kThreadRows; ++r) {
                highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], lanes));
            }
        }
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
            // A maximum that is exceeded by little stays: exponentials up to 2^8 are as exact, and
            // mostly the output need not be rescaled.
            const bool exceeds = (highest[r] - max[r]) * scale_log2 > kMaxExcess;
            const float chosen = exceeds ? highest[r] : max[r];
            // -inf - (-inf) would be NaN.
            shift[r] = kMasked && chosen == -INFINITY ? 0.0f : chosen * scale_log2;
            factors[r] = exp2_approximate(fmaf(max[r], scale_log2, -shift[r]));
            max[r] = chosen;
        }
        float even[kThreadRows] = {0, 0}, odd[kThreadRows] = {0, 0};
        CUTE_UNROLL
        for (int e = 0; e < kRowElements<kColumns>; e += 2) {
            CUTE_UNROLL
            for (int r = 0; r < kThreadRows; ++r) {
                float& first = scores(element_index(r, e));
                float& second = scores(element_index(r, e + 1));
                first = exp2_approximate(fmaf(first, scale_log2, -shift[r]));
                second = exp2_approximate(fmaf(second, scale_log2, -shift[r]));
                even[r] += first;
                odd[r] += second;
            }
        }
        CUTE_UNROLL
        for (int r = 0; r < kThreadRows; ++r) {
            sum[r] = fmaf(sum[r], factors[r], even[r] + odd[r]);
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

}  // namespace lemo::cuda::segment_attention::hopper
