// The kernels of token_select: one thread block for each sequence finds the score that cuts off its
// share by radix selection and numbers what it keeps in one stable pass; one warp for each block
// then writes the rows. Integers only, so the result has the same bits on every run.
#include "token_select/portable/kernels.h"

#include <cub/block/block_scan.cuh>

#include "common/launch.h"
#include "common/search.h"
#include "lemo/blocks.h"

namespace lemo::cuda::token_select::portable {
namespace {

// Blocks of a sequence that are looked at in one step: 64K tokens in blocks of 64 are one step.
constexpr int kThreads = 1024;
constexpr int kWarpsPerBlock = 8;
// Radix selection fixes this many bits of the cutting score in one pass over the sequence.
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr unsigned kAllLanes = 0xffffffffu;

/// Two counts that are summed as one number: neither sum reaches 2^31, so none carries over.
using Pair = unsigned long long;
using PairScan = cub::BlockScan<Pair, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

__device__ __forceinline__ Pair make_pair(int high, int low) {
    return Pair{static_cast<unsigned>(high)} << 32 | static_cast<unsigned>(low);
}
__device__ __forceinline__ int high_of(Pair pair) { return static_cast<int>(pair >> 32); }
__device__ __forceinline__ int low_of(Pair pair) { return static_cast<int>(pair & 0xffffffffu); }

/// Unsigned integers in the order of the scores; 0 for NaN, below all of them.
__device__ __forceinline__ uint32_t order_of(float score) {
    if (isnan(score)) return 0;
    uint32_t bits = __float_as_uint(score);
    if (bits == 0x80000000u) bits = 0;  // -0 equals 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct RadixScratch {
    int histogram[kDigits];
    int digit, left;
};

/// The `left`-th best score of a set has order `order`; of the scores equal to it `left` are taken.
struct Cut {
    uint32_t order;
    int left;
};

/// Where the `num_taken` best of the scores [first, end) end; 0 < num_taken <= end - first. All
/// threads of the block take part and get the same result.
__device__ Cut find_cut(const float* scores, int64_t first, int64_t end, int num_taken,
                        RadixScratch& scratch) {
    const int lane = threadIdx.x % 32;
    Cut cut{0, num_taken};
    for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
        for (int d = threadIdx.x; d < kDigits; d += kThreads) scratch.histogram[d] = 0;
        __syncthreads();
        // The bounds are the same for all threads: every lane takes part in the match below.
        for (int64_t base = first; base < end; base += kThreads) {
            const int64_t b = base + threadIdx.x;
            int digit = kDigits;  // of no candidate
            if (b < end) {
                const uint64_t order = order_of(scores[b]);
                const int known = shift + kDigitBits;  // the bits from here on are fixed already
                if (order >> known == uint64_t{cut.order} >> known) {
                    digit = static_cast<int>(order >> shift) & (kDigits - 1);
                }
            }
            // One addition for all lanes with the same digit: most scores share their first ones.
            const unsigned peers = __match_any_sync(kAllLanes, digit);
            if (digit < kDigits && lane == __ffs(peers) - 1) {
                atomicAdd(&scratch.histogram[digit], __popc(peers));
            }
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            // Lane l adds up the digits from 255 - 8 l down to 248 - 8 l.
            constexpr int kPerLane = kDigits / 32;
            const int highest = kDigits - 1 - lane * kPerLane;
            int sum = 0;
            for (int i = 0; i < kPerLane; ++i) sum += scratch.histogram[highest - i];
            int through = sum;  // candidates of this lane's digits and of higher ones
            for (int offset = 1; offset < 32; offset *= 2) {
                const int other = __shfl_up_sync(kAllLanes, through, offset);
                if (lane >= offset) through += other;
            }
            int before = through - sum;
            if (before < cut.left && cut.left <= through) {
                int digit = highest;
                while (before + scratch.histogram[digit] < cut.left) {
                    before += scratch.histogram[digit--];
                }
                scratch.digit = digit;
                scratch.left = cut.left - before;
            }
        }
        // Also keeps the histogram from being cleared while the warp above still reads it.
        __syncthreads();
        cut.order |= static_cast<uint32_t>(scratch.digit) << shift;
        cut.left = scratch.left;
    }
    return cut;
}

__global__ void
__launch_bounds__(kThreads) select_kernel(SelectArguments args) {
    __shared__ RadixScratch radix;
    __shared__ PairScan::TempStorage scan;
    const int64_t n = blockIdx.x;
    const int64_t first = args.cu_blocks[n], end = args.cu_blocks[n + 1];
    const Range open = open_blocks(end - first, args.keep_first, args.keep_last);
    const int64_t open_first = first + open.first, open_end = first + open.end;
    const int64_t num_taken =
        args.is_ratio ? num_taken_blocks(end - first, open, args.value) : 0;
    const bool all = args.is_ratio && num_taken == open_end - open_first;
    const bool cuts = args.is_ratio && num_taken > 0 && !all;  // the same for all threads
    Cut cut{0, 0};
    if (cuts) {
        cut = find_cut(args.scores, open_first, open_end, static_cast<int>(num_taken), radix);
    }

    int num_ties = 0, num_kept = 0, num_rows = 0;  // of the blocks before `base`
    for (int64_t base = first; base < end; base += kThreads) {
        const int64_t b = base + threadIdx.x;
        const bool is_open = open_first <= b && b < open_end;
        bool kept = b < end && (!is_open || all);
        if (is_open && !args.is_ratio) kept = static_cast<double>(args.scores[b]) >= args.value;
        if (cuts) {
            const uint32_t order = is_open ? order_of(args.scores[b]) : 0;
            const bool tie = is_open && order == cut.order;
            Pair before, total;
            PairScan(scan).ExclusiveSum(make_pair(0, tie), before, total);
            __syncthreads();  // `scan` is used again
            // Of equal scores the earlier blocks are taken.
            kept = kept || (is_open && order > cut.order) ||
                   (tie && num_ties + low_of(before) < cut.left);
            num_ties += low_of(total);
        }
        const int length = kept ? args.block_starts[b + 1] - args.block_starts[b] : 0;
        Pair before, total;
        PairScan(scan).ExclusiveSum(make_pair(kept, length), before, total);
        __syncthreads();
        if (b < end) {
            args.places[b] = kept ? make_int2(num_kept + high_of(before), num_rows + low_of(before))
                                  : make_int2(-1, -1);
        }
        num_kept += high_of(total);
        num_rows += low_of(total);
    }
    if (threadIdx.x > 0) return;
    args.cu_kept[n + 1] = num_kept;
    args.cu_rows[n + 1] = num_rows;
    if (gridDim.x > 1) return;
    args.cu_kept[0] = args.cu_rows[0] = 0;
    args.counts[0] = num_kept;
    args.counts[1] = num_rows;
}

/// Sums the counts of the sequences up in place, into the first kept block and row of each.
__global__ void __launch_bounds__(kThreads)
scan_kernel(int64_t num_sequences, int32_t* cu_kept, int32_t* cu_rows, int64_t* counts) {
    __shared__ PairScan::TempStorage scan;
    int num_kept = 0, num_rows = 0;
    for (int64_t base = 1; base <= num_sequences; base += kThreads) {
        const int64_t n = base + threadIdx.x;
        Pair through = n <= num_sequences ? make_pair(cu_kept[n], cu_rows[n]) : 0, total;
        PairScan(scan).InclusiveSum(through, through, total);
        __syncthreads();  // `scan` is used again
        if (n <= num_sequences) {
            cu_kept[n] = num_kept + high_of(through);
            cu_rows[n] = num_rows + low_of(through);
        }
        num_kept += high_of(total);
        num_rows += low_of(total);
    }
    if (threadIdx.x > 0) return;
    cu_kept[0] = cu_rows[0] = 0;
    counts[0] = num_kept;
    counts[1] = num_rows;
}

__global__ void __launch_bounds__(kWarpsPerBlock * 32) token_rows_kernel(RowsArguments args) {
    const int64_t b = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (b >= args.num_blocks) return;
    const int2 place = args.places[b];
    if (place.x < 0) return;
    const int64_t n = part_of(args.cu_blocks, args.num_sequences, b);
    // The caller's sizes may be wrong; nothing is written beyond them.
    const int64_t kept_idx = int64_t{args.cu_kept[n]} + place.x;
    if (lane == 0 && kept_idx < args.num_kept) args.kept_blocks[kept_idx] = static_cast<int32_t>(b);
    const int32_t row_first = args.block_starts[b], row_end = args.block_starts[b + 1];
    const int32_t sequence_first = args.block_starts[args.cu_blocks[n]];
    const int64_t out_first = int64_t{args.cu_rows[n]} + place.y;
    for (int32_t i = lane; i < row_end - row_first; i += 32) {
        if (out_first + i >= args.num_rows) return;
        args.rows[out_first + i] = row_first + i;
        args.positions[out_first + i] = row_first + i - sequence_first;
    }
}

}  // namespace

void launch_select(const SelectArguments& args, int64_t num_sequences, cudaStream_t stream) {
    if (num_sequences > 0) {
        select_kernel<<<static_cast<unsigned>(num_sequences), kThreads, 0, stream>>>(args);
        check_launch("token_select");
    }
    // A single sequence needs no sums.
    if (num_sequences != 1) {
        scan_kernel<<<1, kThreads, 0, stream>>>(num_sequences, args.cu_kept, args.cu_rows,
                                                args.counts);
        check_launch("token_select");
    }
}

void launch_rows(const RowsArguments& args, cudaStream_t stream) {
    if (args.num_blocks == 0) return;
    const auto grid = static_cast<unsigned>(ceil_div<int64_t>(args.num_blocks, kWarpsPerBlock));
    token_rows_kernel<<<grid, kWarpsPerBlock * 32, 0, stream>>>(args);
    check_launch("token_select");
}

}  // namespace lemo::cuda::token_select::portable
