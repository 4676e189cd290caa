#include "lemo/block_scores.h"

#include <algorithm>
#include <string>
#include <vector>

#include "block_runs.h"
#include "convert.h"
#include "gemm.h"
#include "lemo/check.h"
#include "multiversion.h"
#include "parallel.h"

namespace lemo {
namespace {

// One product covers at most this many rows of queries and of keys: large enough for BLAS, small
// enough that both tiles of S stay in the L2 cache.
constexpr int64_t kQueryRows = 128;
constexpr int64_t kKeyRows = 256;

/// Runs of key blocks, those with the most queries to walk first. A task walks all queries that can
/// see the keys of one run, so each score has one writer and nothing larger than a tile is shared.
std::vector<cpu::BlockRun> plan_tasks(const int32_t* start, const int32_t* cut,
                                      int64_t num_sequences) {
    std::vector<cpu::BlockRun> runs = cpu::cut_runs(start, cut, num_sequences, kKeyRows);
    const auto work = [start](const cpu::BlockRun& run) {
        const int64_t keys = start[run.end] - start[run.first];
        return keys * (start[run.sequence_end] - start[run.first]);
    };
    std::stable_sort(runs.begin(), runs.end(), [&](const cpu::BlockRun& a, const cpu::BlockRun& b) {
        return work(a) > work(b);
    });
    return runs;
}

inline float positive(float value) { return value > 0.0f ? value : 0.0f; }

/// to = max(from, 0), or to += max(from, 0).
LEMO_MULTIVERSION void accumulate_positive(const float* from, int64_t n, bool first, float* to) {
    if (first) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = positive(from[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] += positive(from[i]);
    }
}

LEMO_MULTIVERSION float maximum(const float* values, int64_t n, float at_least) {
    float result = at_least;
#pragma omp simd reduction(max : result)
    for (int64_t i = 0; i < n; ++i) result = std::max(result, values[i]);
    return result;
}

template <typename T>
class Walker {
public:
    explicit Walker(const BlockScoresParams& params)
        : q_(params.q.as<const T>()), k_(params.k.as<const T>()),
          start_(params.block_starts.as<const int32_t>()), scores_(params.scores.as<float>()),
          heads_(params.q.size(1)), key_heads_(params.k.size(1)), head_dim_(params.q.size(2)),
          scale_(static_cast<float>(params.scale / static_cast<double>(heads_))),
          product_(kQueryRows * kKeyRows), sum_(kQueryRows * kKeyRows) {}

    void walk(const cpu::BlockRun& run) {
        const int64_t key_blocks = run.end - run.first;
        const int64_t query_blocks = run.sequence_end - run.first;
        maxima_.assign(static_cast<size_t>(query_blocks * key_blocks), 0.0f);
        const int64_t key_end = start_[run.end], query_end = start_[run.sequence_end];
        for (int64_t j = start_[run.first]; j < key_end; j += kKeyRows) {
            const int64_t num_keys = std::min(kKeyRows, key_end - j);
            const int64_t key_width = key_heads_ * head_dim_, query_width = heads_ * head_dim_;
            const float* keys = cpu::as_float(k_ + j * key_width, num_keys * key_width, wide_k_);
            int64_t query_block = run.first;
            // Queries before the tile's first key see none of it.
            for (int64_t i = j; i < query_end; i += kQueryRows) {
                const int64_t num_queries = std::min(kQueryRows, query_end - i);
                const float* queries =
                    cpu::as_float(q_ + i * query_width, num_queries * query_width, wide_q_);
                sum_over_heads(queries, num_queries, keys, num_keys);
                for (int64_t row = i; row < i + num_queries; ++row) {
                    while (row >= start_[query_block + 1]) ++query_block;
                    const int64_t visible = std::min(num_keys, row - j);
                    take_maxima(run, sum_.data() + (row - i) * num_keys, j, visible,
                                maxima_.data() + (query_block - run.first) * key_blocks);
                }
            }
        }
        for (int64_t n = 0; n < key_blocks; ++n) {
            float sum = 0;
            for (int64_t m = n; m < query_blocks; ++m) {
                sum += maxima_[static_cast<size_t>(m * key_blocks + n)];
            }
            scores_[run.first + n] = scale_ * (sum / static_cast<float>(query_blocks - n));
        }
    }

private:
    /// sum_ [num_queries, num_keys] = sum over heads of max(q . k, 0).
    void sum_over_heads(const float* queries, int64_t num_queries, const float* keys,
                        int64_t num_keys) {
        const int64_t group = heads_ / key_heads_;
        for (int64_t h = 0; h < heads_; ++h) {
            cpu::gemm(cpu::Trans::kNo, cpu::Trans::kYes, num_queries, num_keys, head_dim_, 1.0f,
                      queries + h * head_dim_, heads_ * head_dim_, keys + h / group * head_dim_,
                      key_heads_ * head_dim_, 0.0f, product_.data(), num_keys);
            accumulate_positive(product_.data(), num_queries * num_keys, h == 0, sum_.data());
        }
    }

    /// Raises the maxima of one query row's block by its first `visible` sums, which start at key
    /// row `first_key`.
    void take_maxima(const cpu::BlockRun& run, const float* sums, int64_t first_key,
                     int64_t visible, float* maxima) const {
        const int64_t end_key = first_key + visible;
        for (int64_t n = run.first; n < run.end && start_[n] < end_key; ++n) {
            const int64_t from = std::max<int64_t>(start_[n], first_key);
            const int64_t to = std::min<int64_t>(start_[n + 1], end_key);
            float& best = maxima[n - run.first];
            best = maximum(sums + (from - first_key), to - from, best);
        }
    }

    const T* q_;
    const T* k_;
    const int32_t* start_;
    float* scores_;
    int64_t heads_, key_heads_, head_dim_;
    float scale_;
    std::vector<float> product_, sum_, wide_q_, wide_k_, maxima_;
};

}  // namespace

void check(const BlockScoresParams& params) {
    const Checker check("block_scores");
    check.floating("q", params.q, 3);
    check.floating("k", params.k, 3);
    check.same_dtype("k", params.k, "q", params.q);
    check.same_device({{"q", &params.q},
                       {"k", &params.k},
                       {"block_starts", &params.block_starts},
                       {"cu_blocks", &params.cu_blocks}});
    check.dim("k", params.k, 0, params.q.size(0), "the rows of 'q'");
    check.heads(params.q, params.k);
    check.layout(params.block_starts, params.cu_blocks, params.q.size(0));
    check.scale(params.scale);
    check.that(params.q.device != Device::kCpu || params.kernel == "auto", "kernel",
               "'auto' on the CPU", [&] { return quoted(params.kernel); });
    check.typed("scores", params.scores, DType::kFloat32, 1);
    check.dim("scores", params.scores, 0, params.block_starts.size(0) - 1, "the number of blocks");
}

void block_scores_cpu(const BlockScoresParams& params) {
    const std::vector<cpu::BlockRun> tasks =
        plan_tasks(params.block_starts.as<const int32_t>(), params.cu_blocks.as<const int32_t>(),
                   params.cu_blocks.size(0) - 1);
    cpu::dispatch_float(params.q.dtype, [&]<typename T>(T) {
        std::vector<Walker<T>> walkers(static_cast<size_t>(cpu::max_threads()), Walker<T>(params));
        cpu::parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i, int thread) {
            walkers[static_cast<size_t>(thread)].walk(tasks[static_cast<size_t>(i)]);
        });
    });
}

}  // namespace lemo
