// The kernel of rope: one warp for each row; a lane keeps its place in the head, so it reads the
// tables once and walks over the heads.
#pragma once

#include "common/float_reader.h"
#include "common/vector.h"

namespace lemo::cuda::rope::portable {

constexpr int kWarpsPerBlock = 8;
// One access. Of 16 bytes, the four vectors of the tables in fp32 would take so many registers that
// half as many rows are in flight.
constexpr int kBytes = 8;

struct RopeArguments {
    FloatReader cos, sin;
    const int32_t* rows;
    int64_t num_rows;
    int heads, half;
    bool transposed;
};

/// Lanes for one head, and heads that a warp takes at a time, of `num_vectors` in half a head.
__host__ __device__ constexpr int head_span(int num_vectors) {
    return num_vectors < 32 ? num_vectors : 32;
}
__host__ __device__ constexpr int heads_at_a_time(int num_vectors) {
    return 32 / head_span(num_vectors);
}

/// Rotates kWidth elements of both halves of a head at a time. A lane loads kInFlight heads before
/// it stores the first: no more than it has, since their registers cost rows in flight.
template <typename T, int kWidth, int kInFlight>
__global__ void
__launch_bounds__(kWarpsPerBlock * 32)
rope_kernel(const T* __restrict__ x, T* __restrict__ y, RopeArguments args) {
    using Vector = cutlass::AlignedArray<T, kWidth>;
    const int64_t row_idx = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
    if (row_idx >= args.num_rows) return;
    const int half = args.half, lane = threadIdx.x % 32;
    const int64_t row_first = row_idx * args.heads * 2 * half;
    const int64_t table = (args.rows ? int64_t{args.rows[row_idx]} : row_idx) * 2 * half;

    // A step of the warp is as many half heads as fit into it, or a part of one.
    const int num_vectors = half / kWidth;
    const int span = head_span(num_vectors), heads_per_step = heads_at_a_time(num_vectors);
    if (lane >= span * heads_per_step) return;  // no lane waits for another one below
    for (int v = lane % span; v < num_vectors; v += span) {
        const int64_t i = int64_t{v} * kWidth;
        // y1 = x1 c1 + x2 cross1, y2 = x2 c2 + x1 cross2; transposed, halves and signs swap.
        const auto c1 = args.cos.load<kWidth>(table + i);
        const auto c2 = args.cos.load<kWidth>(table + half + i);
        auto cross1 = args.sin.load<kWidth>(table + (args.transposed ? half : 0) + i);
        auto cross2 = args.sin.load<kWidth>(table + (args.transposed ? 0 : half) + i);
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < kWidth; ++e) {
            cross1[e] = args.transposed ? cross1[e] : -cross1[e];
            cross2[e] = args.transposed ? -cross2[e] : cross2[e];
        }
        for (int head = lane / span; head < args.heads; head += kInFlight * heads_per_step) {
            Vector first[kInFlight], second[kInFlight];
            CUTLASS_PRAGMA_UNROLL
            for (int s = 0; s < kInFlight; ++s) {
                const int h = head + s * heads_per_step;
                if (h >= args.heads) continue;
                const T* from = x + row_first + int64_t{h} * 2 * half + i;
                first[s] = load_vector<kWidth>(from);
                second[s] = load_vector<kWidth>(from + half);
            }
            CUTLASS_PRAGMA_UNROLL
            for (int s = 0; s < kInFlight; ++s) {
                const int h = head + s * heads_per_step;
                if (h >= args.heads) continue;
                CUTLASS_PRAGMA_UNROLL
                for (int e = 0; e < kWidth; ++e) {
                    const float x1 = float(first[s][e]), x2 = float(second[s][e]);
                    first[s][e] = T(x1 * c1[e] + x2 * cross1[e]);
                    second[s][e] = T(x2 * c2[e] + x1 * cross2[e]);
                }
                T* to = y + row_first + int64_t{h} * 2 * half + i;
                store_vector<kWidth>(to, first[s]);
                store_vector<kWidth>(to + half, second[s]);
            }
        }
    }
}

}  // namespace lemo::cuda::rope::portable
