#include "attention_tile.h"

#include <algorithm>

#include "exp2.h"
#include "multiversion.h"
#include "tanh.h"

namespace lemo::cpu {
namespace {

/// The columns of the tile that row `row` sees.
[[gnu::always_inline]] inline Range columns(const ScoreTile& tile, int64_t row) {
    const int64_t first = tile.visible[row].first - tile.first_key;
    const int64_t end = tile.visible[row].end - tile.first_key;
    const Range seen{first < 0 ? 0 : first, end > tile.keys ? tile.keys : end};
    return seen.first < seen.end ? seen : Range{0, 0};
}

[[gnu::always_inline]] inline void zero_outside(float* row, int64_t keys, Range seen) {
    for (int64_t j = 0; j < seen.first; ++j) row[j] = 0.0f;
    for (int64_t j = seen.end; j < keys; ++j) row[j] = 0.0f;
}

}  // namespace

LEMO_MULTIVERSION
void softmax_tile(const ScoreTile& tile, float* scores, float* row_max, float* row_sum, float* out,
                  int64_t head_size) {
    for (int64_t r = 0; r < tile.rows; ++r) {
        float* s = scores + r * tile.keys;
        const Range seen = columns(tile, r);
        zero_outside(s, tile.keys, seen);
        if (seen.first == seen.end) continue;

        if (tile.cap_log2 > 0.0f) {
#pragma omp simd
            for (int64_t j = seen.first; j < seen.end; ++j) {
                s[j] = tile.cap_log2 * tanh_fast(s[j]);
            }
        }
        float top = row_max[r];
#pragma omp simd reduction(max : top)
        for (int64_t j = seen.first; j < seen.end; ++j) top = s[j] > top ? s[j] : top;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = seen.first; j < seen.end; ++j) {
            s[j] = exp2_fast(s[j] - top);
            sum += s[j];
        }
        if (top > row_max[r]) {
            const float decay = exp2_fast(row_max[r] - top);
            float* o = out + r * head_size;
#pragma omp simd
            for (int64_t i = 0; i < head_size; ++i) o[i] *= decay;
            row_sum[r] *= decay;
            row_max[r] = top;
        }
        row_sum[r] += sum;
    }
}

LEMO_MULTIVERSION
void softmax_backward_tile(const ScoreTile& tile, float* scores, float* dp, const float* log2_sum,
                           const float* delta) {
    for (int64_t r = 0; r < tile.rows; ++r) {
        float* p = scores + r * tile.keys;
        float* ds = dp + r * tile.keys;
        const Range seen = columns(tile, r);
        zero_outside(p, tile.keys, seen);
        zero_outside(ds, tile.keys, seen);
        const float shift = log2_sum[r], mean = delta[r];
        if (tile.cap_log2 > 0.0f) {
#pragma omp simd
            for (int64_t j = seen.first; j < seen.end; ++j) {
                const float t = tanh_fast(p[j]);
                p[j] = exp2_fast(tile.cap_log2 * t - shift);
                ds[j] = p[j] * (ds[j] - mean) * (1.0f - t * t);
            }
            continue;
        }
#pragma omp simd
        for (int64_t j = seen.first; j < seen.end; ++j) {
            p[j] = exp2_fast(p[j] - shift);
            ds[j] = p[j] * (ds[j] - mean);
        }
    }
}

}  // namespace lemo::cpu
