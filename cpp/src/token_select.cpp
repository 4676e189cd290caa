#include "lemo/token_select.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "lemo/blocks.h"
#include "lemo/check.h"

namespace lemo {
namespace {

constexpr char kRatio[] = "ratio";
constexpr char kThreshold[] = "threshold";

/// Rows that the layout covers; -1 where that is only known on the device.
int64_t rows_covered(const Checker& check, const Tensor& block_starts) {
    check.typed("block_starts", block_starts, DType::kInt32, 1);
    if (block_starts.device != Device::kCpu || block_starts.size(0) == 0) return -1;
    return block_starts.as<const int32_t>()[block_starts.size(0) - 1];
}

/// Marks in `kept` the `num_taken` best of the blocks [first, end), ties to the earlier block.
void take_best(const float* score, int64_t first, int64_t end, int64_t num_taken, char* kept) {
    std::vector<int64_t> order(static_cast<size_t>(end - first));
    std::iota(order.begin(), order.end(), first);
    std::nth_element(
        order.begin(), order.begin() + num_taken, order.end(),
        [&](int64_t a, int64_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
    for (int64_t i = 0; i < num_taken; ++i) kept[order[static_cast<size_t>(i)]] = 1;
}

}  // namespace

void check(const TokenSelectParams& params) {
    const Checker check("token_select");
    check.typed("scores", params.scores, DType::kFloat32, 1);
    check.same_device({{"scores", &params.scores},
                       {"block_starts", &params.block_starts},
                       {"cu_blocks", &params.cu_blocks}});
    check.layout(params.block_starts, params.cu_blocks, rows_covered(check, params.block_starts));
    check.dim("scores", params.scores, 0, params.block_starts.size(0) - 1,
              "the number of blocks of the layout");

    const bool is_ratio = params.policy == kRatio;
    check.that(is_ratio || params.policy == kThreshold, "policy", "'ratio' or 'threshold'",
               [&] { return quoted(params.policy); });
    if (is_ratio) {
        check.that(params.value >= 0 && params.value <= 1, "value", "a share between 0 and 1",
                   params.value);
    } else {
        check.that(!std::isnan(params.value), "value", "a threshold that is a number", "nan");
    }
    check.that(params.keep_first >= 0, "keep_first", "at least 0", params.keep_first);
    check.that(params.keep_last >= 0, "keep_last", "at least 0", params.keep_last);

    if (params.scores.device != Device::kCpu) return;
    const float* score = params.scores.as<const float>();
    for (int64_t b = 0; b < params.scores.size(0); ++b) {
        if (std::isnan(score[b])) {
            check.fail("scores", "numbers", "nan for block " + std::to_string(b));
        }
    }
}

void check(const TokenRowsParams& params) {
    const Checker check("token_select");
    check.layout(params.block_starts, params.cu_blocks, rows_covered(check, params.block_starts));
    const int64_t blocks = params.block_starts.size(0) - 1;
    check.typed("places", params.places, DType::kInt32, 2);
    check.dim("places", params.places, 0, blocks, "the number of blocks of the layout");
    check.dim("places", params.places, 1, 2, "a place and a row");
    for (const auto& [argument, tensor] :
         {std::pair{"cu_kept", &params.cu_kept}, {"cu_rows", &params.cu_rows}}) {
        check.typed(argument, *tensor, DType::kInt32, 1);
        check.dim(argument, *tensor, 0, params.cu_blocks.size(0), "that of 'cu_blocks'");
    }
    check.typed("kept_blocks", params.kept_blocks, DType::kInt32, 1);
    check.typed("rows", params.rows, DType::kInt32, 1);
    check.typed("positions", params.positions, DType::kInt32, 1);
    check.dim("positions", params.positions, 0, params.rows.size(0), "the number of 'rows'");
    check.same_device({{"block_starts", &params.block_starts},
                       {"cu_blocks", &params.cu_blocks},
                       {"places", &params.places},
                       {"cu_kept", &params.cu_kept},
                       {"cu_rows", &params.cu_rows},
                       {"kept_blocks", &params.kept_blocks},
                       {"rows", &params.rows},
                       {"positions", &params.positions}});
    if (params.rows.device != Device::kCpu) return;

    const int64_t last = params.cu_blocks.size(0) - 1;
    const int64_t num_kept = params.cu_kept.as<const int32_t>()[last];
    const int64_t num_rows = params.cu_rows.as<const int32_t>()[last];
    if (params.kept_blocks.size(0) != num_kept) {
        check.fail("num_kept_blocks", std::to_string(num_kept) + ", what the policy keeps",
                   std::to_string(params.kept_blocks.size(0)));
    }
    if (params.rows.size(0) != num_rows) {
        check.fail("num_kept_rows", std::to_string(num_rows) + ", the rows of the kept blocks",
                   std::to_string(params.rows.size(0)));
    }
}

void token_select_cpu(const TokenSelectParams& params) {
    const float* score = params.scores.as<const float>();
    const int32_t* start = params.block_starts.as<const int32_t>();
    const int32_t* cut = params.cu_blocks.as<const int32_t>();
    int32_t* place = params.places.as<int32_t>();
    int32_t* cu_kept = params.cu_kept.as<int32_t>();
    int32_t* cu_rows = params.cu_rows.as<int32_t>();

    std::vector<char> kept(static_cast<size_t>(params.scores.size(0)), 0);
    cu_kept[0] = cu_rows[0] = 0;
    const int64_t num_sequences = params.cu_blocks.size(0) - 1;
    for (int64_t n = 0; n < num_sequences; ++n) {
        const int64_t first = cut[n], end = cut[n + 1], blocks = end - first;
        const Range open = open_blocks(blocks, params.keep_first, params.keep_last);
        std::fill(kept.begin() + first, kept.begin() + first + open.first, 1);
        std::fill(kept.begin() + first + open.end, kept.begin() + end, 1);
        if (params.policy == kThreshold) {
            for (int64_t b = first + open.first; b < first + open.end; ++b) {
                kept[b] = score[b] >= params.value;
            }
        } else {
            take_best(score, first + open.first, first + open.end,
                      num_taken_blocks(blocks, open, params.value), kept.data());
        }
        int32_t num_kept = 0, num_rows = 0;
        for (int64_t b = first; b < end; ++b) {
            place[2 * b] = kept[b] ? num_kept : -1;
            place[2 * b + 1] = kept[b] ? num_rows : -1;
            if (!kept[b]) continue;
            ++num_kept;
            num_rows += start[b + 1] - start[b];
        }
        cu_kept[n + 1] = cu_kept[n] + num_kept;
        cu_rows[n + 1] = cu_rows[n] + num_rows;
    }
    params.counts.as<int64_t>()[0] = cu_kept[num_sequences];
    params.counts.as<int64_t>()[1] = cu_rows[num_sequences];
}

void token_rows_cpu(const TokenRowsParams& params) {
    const int32_t* start = params.block_starts.as<const int32_t>();
    const int32_t* cut = params.cu_blocks.as<const int32_t>();
    const int32_t* place = params.places.as<const int32_t>();
    const int32_t* cu_kept = params.cu_kept.as<const int32_t>();
    const int32_t* cu_rows = params.cu_rows.as<const int32_t>();
    int32_t* kept_block = params.kept_blocks.as<int32_t>();
    int32_t* row = params.rows.as<int32_t>();
    int32_t* position = params.positions.as<int32_t>();

    for (int64_t n = 0; n + 1 < params.cu_blocks.size(0); ++n) {
        for (int32_t b = cut[n]; b < cut[n + 1]; ++b) {
            if (place[2 * b] < 0) continue;
            kept_block[cu_kept[n] + place[2 * b]] = b;
            int64_t r = cu_rows[n] + place[2 * b + 1];
            for (int32_t at = start[b]; at < start[b + 1]; ++at, ++r) {
                row[r] = at;
                position[r] = at - start[cut[n]];
            }
        }
    }
}

}  // namespace lemo
