#include "lemo/block_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "block_runs.h"
#include "convert.h"
#include "exp2.h"
#include "gemm.h"
#include "lemo/check.h"
#include "multiversion.h"
#include "parallel.h"

namespace lemo {
namespace {

// One product covers at most this many queries and keys: large enough for BLAS, small enough that
// its scores stay in the L2 cache.
constexpr int64_t kQueryRows = 128;
constexpr int64_t kKeyRows = 512;

constexpr float kNothing = -std::numeric_limits<float>::infinity();

std::vector<int64_t> to_vector(const Tensor& rows) {
    const int64_t n = rows.size(0);
    if (rows.dtype == DType::kInt64) {
        return {rows.as<const int64_t>(), rows.as<const int64_t>() + n};
    }
    return {rows.as<const int32_t>(), rows.as<const int32_t>() + n};
}

/// The queries by their rows, so that those that see a key follow one another.
struct Queries {
    std::vector<int64_t> place;  // of each query in the arguments and results
    std::vector<int64_t> row;    // ascending
    std::vector<float> values;   // [Hk, R, H / Hk, D]

    explicit Queries(const BlockAttentionParams& params) : row(to_vector(params.rows)) {
        place.resize(row.size());
        std::iota(place.begin(), place.end(), 0);
        std::stable_sort(place.begin(), place.end(), [&](int64_t a, int64_t b) {
            return row[static_cast<size_t>(a)] < row[static_cast<size_t>(b)];
        });
        std::sort(row.begin(), row.end());
        values.resize(static_cast<size_t>(params.q.num_elements()));
        const int64_t key_heads = params.k.size(1), num_rows = params.q.size(0);
        const int64_t width = params.q.size(1) / key_heads * params.q.size(2);
        cpu::dispatch_float(params.q.dtype, [&]<typename T>(T) {
            cpu::parallel_for(key_heads, [&](int64_t head, int) {
                for (int64_t i = 0; i < num_rows; ++i) {
                    const int64_t from = (place[static_cast<size_t>(i)] * key_heads + head) * width;
                    cpu::load_row(values.data() + (head * num_rows + i) * width,
                                  params.q.as<const T>() + from, width);
                }
            });
        });
    }

    /// Index of the first query at `key` or behind it.
    int64_t first_from(int64_t key) const {
        return std::lower_bound(row.begin(), row.end(), key) - row.begin();
    }
};

/// Takes a query's scores for the keys [first, end) into its results for their blocks, from
/// `block` on.
LEMO_MULTIVERSION
void take_scores(const float* scores, int64_t first, int64_t end, const int32_t* start,
                 int64_t block, float* maximum, float* logsumexp) {
    for (int64_t b = block; start[b] < end; ++b) {
        const float* from = scores + (std::max<int64_t>(start[b], first) - first);
        const int64_t n = std::min<int64_t>(start[b + 1], end) - first - (from - scores);
        float top = kNothing;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < n; ++i) top = from[i] > top ? from[i] : top;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) sum += cpu::exp2_fast((from[i] - top) * cpu::kLog2E);
        // A block larger than a tile comes in parts.
        maximum[b] = std::max(maximum[b], top);
        logsumexp[b] = maximum[b] + std::log(std::exp(logsumexp[b] - maximum[b]) +
                                             sum * std::exp(top - maximum[b]));
    }
}

/// One thread's work on a run of blocks.
template <typename T>
class Walker {
public:
    Walker(const BlockAttentionParams& params, const Queries& queries)
        : queries_(queries), k_(params.k.as<const T>()),
          start_(params.block_starts.as<const int32_t>()), maximum_(params.maximum.as<float>()),
          logsumexp_(params.logsumexp.as<float>()), num_rows_(params.q.size(0)),
          num_blocks_(params.block_starts.size(0) - 1), key_heads_(params.k.size(1)),
          group_(params.q.size(1) / key_heads_), head_dim_(params.q.size(2)),
          scale_(static_cast<float>(params.scale)) {}

    void walk(const cpu::BlockRun& run, int64_t key_head) {
        // The stacked rows of the query heads that share this key head.
        const float* stacked = queries_.values.data() + key_head * num_rows_ * group_ * head_dim_;
        const int64_t key_end = start_[run.end];
        const int64_t end_query = queries_.first_from(start_[run.sequence_end]) * group_;
        for (int64_t j = start_[run.first]; j < key_end; j += kKeyRows) {
            const int64_t num_keys = std::min(kKeyRows, key_end - j);
            const int64_t first_query = queries_.first_from(j) * group_;
            if (first_query == end_query) return;  // later keys are seen by fewer
            keys_.resize(static_cast<size_t>(num_keys * head_dim_));
            cpu::load_rows(keys_.data(), k_ + (j * key_heads_ + key_head) * head_dim_, num_keys,
                           key_heads_ * head_dim_, head_dim_);
            for (int64_t i = first_query; i < end_query; i += kQueryRows) {
                const int64_t num_queries = std::min(kQueryRows, end_query - i);
                scores_.resize(static_cast<size_t>(num_queries * num_keys));
                cpu::gemm(cpu::Trans::kNo, cpu::Trans::kYes, num_queries, num_keys, head_dim_,
                          scale_, stacked + i * head_dim_, head_dim_, keys_.data(), head_dim_, 0.0f,
                          scores_.data(), num_keys);
                for (int64_t s = 0; s < num_queries; ++s) {
                    const auto query = static_cast<size_t>((i + s) / group_);
                    const int64_t head = key_head * group_ + (i + s) % group_;
                    const int64_t to =
                        (queries_.place[query] * key_heads_ * group_ + head) * num_blocks_;
                    take_scores(scores_.data() + s * num_keys, j,
                                std::min(j + num_keys, queries_.row[query] + 1), start_, run.first,
                                maximum_ + to, logsumexp_ + to);
                }
            }
        }
    }

private:
    const Queries& queries_;
    const T* k_;
    const int32_t* start_;
    float* maximum_;
    float* logsumexp_;
    int64_t num_rows_, num_blocks_, key_heads_, group_, head_dim_;
    float scale_;
    std::vector<float> keys_, scores_;
};

}  // namespace

void check(const BlockAttentionParams& params) {
    const Checker check("block_attention");
    check.floating("q", params.q, 3);
    check.floating("k", params.k, 3);
    check.same_dtype("k", params.k, "q", params.q);
    check.same_device({{"q", &params.q},
                       {"k", &params.k},
                       {"rows", &params.rows},
                       {"block_starts", &params.block_starts},
                       {"cu_blocks", &params.cu_blocks}});
    check.heads(params.q, params.k);
    const bool is_index = params.rows.dtype == DType::kInt32 || params.rows.dtype == DType::kInt64;
    check.that(is_index, "rows", "int32 or int64", params.rows, ErrorKind::kType);
    check.typed("rows", params.rows, params.rows.dtype, 1);
    check.dim("rows", params.rows, 0, params.q.size(0), "the rows of 'q'");
    const int64_t num_tokens = params.k.size(0);
    check.layout(params.block_starts, params.cu_blocks, num_tokens);
    if (params.rows.device == Device::kCpu) {
        for (const int64_t row : to_vector(params.rows)) {
            check.that(
                row >= 0 && row < num_tokens, "rows",
                [&] { return "indices of the " + std::to_string(num_tokens) + " rows of 'k'"; },
                row);
        }
    }
    check.scale(params.scale);
    for (const auto& [name, result] :
         {std::pair{"maximum", &params.maximum}, std::pair{"logsumexp", &params.logsumexp}}) {
        check.typed(name, *result, DType::kFloat32, 3);
        check.dim(name, *result, 0, params.q.size(0), "the rows of 'q'");
        check.dim(name, *result, 1, params.q.size(1), "the heads of 'q'");
        check.dim(name, *result, 2, params.block_starts.size(0) - 1, "the number of blocks");
    }
}

void block_attention_cpu(const BlockAttentionParams& params) {
    std::fill_n(params.maximum.as<float>(), params.maximum.num_elements(), kNothing);
    std::fill_n(params.logsumexp.as<float>(), params.logsumexp.num_elements(), kNothing);
    const std::vector<cpu::BlockRun> runs =
        cpu::cut_runs(params.block_starts.as<const int32_t>(), params.cu_blocks.as<const int32_t>(),
                      params.cu_blocks.size(0) - 1, kKeyRows);
    const Queries queries(params);
    const int64_t key_heads = params.k.size(1);
    cpu::dispatch_float(params.q.dtype, [&]<typename T>(T) {
        std::vector<Walker<T>> walkers(static_cast<size_t>(cpu::max_threads()),
                                       Walker<T>(params, queries));
        cpu::parallel_for(static_cast<int64_t>(runs.size()) * key_heads,
                          [&](int64_t i, int thread) {
                              walkers[static_cast<size_t>(thread)].walk(
                                  runs[static_cast<size_t>(i / key_heads)], i % key_heads);
                          });
    });
}

}  // namespace lemo
