#include "lemo/token_select.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "lemo/check.h"

namespace lemo {
namespace {

// value * blocks may land an ulp above a whole number: 0.07 * 100 is 7 blocks, not 8.
constexpr double kShareSlack = 1e-9;

constexpr char kRatio[] = "ratio";
constexpr char kThreshold[] = "threshold";

/// Rows that the layout covers; -1 where that is only known on the device.
int64_t rows_covered(const Tensor& block_starts) {
    if (block_starts.device != Device::kCpu || block_starts.dtype != DType::kInt32 ||
        block_starts.ndim != 1 || block_starts.size(0) == 0) {
        return -1;
    }
    return block_starts.as<const int32_t>()[block_starts.size(0) - 1];
}

/// Marks in `kept` the `num_taken` best of the blocks [first, end), ties to the earlier block.
void take_best(const float* score, int64_t first, int64_t end, int64_t num_taken, char* kept) {
    std::vector<int64_t> order(static_cast<size_t>(end - first));
    std::iota(order.begin(), order.end(), first);
    std::nth_element(order.begin(), order.begin() + num_taken, order.end(),
                     [&](int64_t a, int64_t b) {
                         return score[a] != score[b] ? score[a] > score[b] : a < b;
                     });
    for (int64_t i = 0; i < num_taken; ++i) kept[order[static_cast<size_t>(i)]] = 1;
}

}  // namespace

void check(const TokenSelectParams& params) {
    const Checker check("token_select");
    check.typed("scores", params.scores, DType::kFloat32, 1);
    check.same_device({{"scores", &params.scores},
                       {"block_starts", &params.block_starts},
                       {"cu_blocks", &params.cu_blocks}});
    check.layout(params.block_starts, params.cu_blocks, rows_covered(params.block_starts));
    check.dim("scores", params.scores, 0, params.block_starts.size(0) - 1,
              "the number of blocks of the layout");

    const bool is_ratio = params.policy == kRatio;
    check.that(is_ratio || params.policy == kThreshold, "policy", "'ratio' or 'threshold'",
               std::string("'").append(params.policy).append("'"));
    if (is_ratio) {
        check.that(params.value >= 0 && params.value <= 1, "value", "a share between 0 and 1",
                   std::to_string(params.value));
    } else {
        check.that(!std::isnan(params.value), "value", "a threshold that is a number", "nan");
    }
    check.that(params.keep_first >= 0, "keep_first", "at least 0",
               std::to_string(params.keep_first));
    check.that(params.keep_last >= 0, "keep_last", "at least 0", std::to_string(params.keep_last));

    if (params.scores.device != Device::kCpu) return;
    const float* score = params.scores.as<const float>();
    for (int64_t b = 0; b < params.scores.size(0); ++b) {
        check.that(!std::isnan(score[b]), "scores", "numbers",
                   "nan for block " + std::to_string(b));
    }
}

void check(const TokenRowsParams& params) {
    const Checker check("token_rows");
    check.layout(params.block_starts, params.cu_blocks, rows_covered(params.block_starts));
    check.typed("kept_blocks", params.kept_blocks, DType::kInt32, 1);
    check.ascending_rows("kept_blocks", params.kept_blocks, params.block_starts.size(0) - 1);
    check.typed("rows", params.rows, DType::kInt32, 1);
    check.typed("positions", params.positions, DType::kInt32, 1);
    check.dim("positions", params.positions, 0, params.rows.size(0), "the number of 'rows'");
}

void token_select_cpu(const TokenSelectParams& params) {
    const float* score = params.scores.as<const float>();
    const int32_t* start = params.block_starts.as<const int32_t>();
    const int32_t* cut = params.cu_blocks.as<const int32_t>();
    int32_t* kept_blocks = params.kept_blocks.as<int32_t>();
    int32_t* cu_rows = params.cu_rows.as<int32_t>();

    std::vector<char> kept(static_cast<size_t>(params.scores.size(0)), 0);
    int64_t num_kept = 0, num_rows = 0;
    cu_rows[0] = 0;
    for (int64_t n = 0; n + 1 < params.cu_blocks.size(0); ++n) {
        const int64_t first = cut[n], end = cut[n + 1], blocks = end - first;
        // Only the blocks [open_first, open_end) compete; those around them are forced.
        const int64_t open_first = first + std::min(params.keep_first, blocks);
        const int64_t open_end = std::max(end - std::min(params.keep_last, blocks), open_first);
        std::fill(kept.begin() + first, kept.begin() + open_first, 1);
        std::fill(kept.begin() + open_end, kept.begin() + end, 1);

        if (params.policy == kThreshold) {
            for (int64_t b = open_first; b < open_end; ++b) kept[b] = score[b] >= params.value;
        } else {
            const double share = params.value * static_cast<double>(blocks);
            const int64_t budget = static_cast<int64_t>(std::ceil(share - kShareSlack));
            const int64_t num_open = open_end - open_first, num_forced = blocks - num_open;
            take_best(score, open_first, open_end,
                      std::clamp<int64_t>(budget - num_forced, 0, num_open), kept.data());
        }
        for (int64_t b = first; b < end; ++b) {
            if (!kept[b]) continue;
            kept_blocks[num_kept++] = static_cast<int32_t>(b);
            num_rows += start[b + 1] - start[b];
        }
        cu_rows[n + 1] = static_cast<int32_t>(num_rows);
    }
    params.counts.as<int64_t>()[0] = num_kept;
    params.counts.as<int64_t>()[1] = num_rows;
}

void token_rows_cpu(const TokenRowsParams& params) {
    const int32_t* start = params.block_starts.as<const int32_t>();
    const int32_t* cut = params.cu_blocks.as<const int32_t>();
    const int32_t* kept_block = params.kept_blocks.as<const int32_t>();
    int32_t* row = params.rows.as<int32_t>();
    int32_t* position = params.positions.as<int32_t>();

    int64_t n = 0, r = 0;
    for (int64_t i = 0; i < params.kept_blocks.size(0); ++i) {
        const int32_t block = kept_block[i];
        while (block >= cut[n + 1]) ++n;
        for (int32_t at = start[block]; at < start[block + 1]; ++at, ++r) {
            row[r] = at;
            position[r] = at - start[cut[n]];
        }
    }
}

}  // namespace lemo
