// Backward of segment_attention: one pass over the pairs of key and query tiles.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "attention_plan.h"
#include "attention_tile.h"
#include "convert.h"
#include "exp2.h"
#include "gemm.h"
#include "lemo/segment_attention.h"
#include "parallel.h"

namespace lemo {
namespace {

constexpr int64_t kStackedRows = 192;
constexpr int64_t kTileKeys = 256;

// A task owns dK and dV of one key tile of one kv head and walks over the query tiles that see it.
// dQ of a query tile is the sum over key tiles, so several tasks add to it. Recomputing P and dP in
// a second pass over query tiles would cost 7 products instead of 5; a partial dQ for each task
// would cost memory that grows with the square of the length. Instead the tasks take turns: each
// adds to a query tile after the task of the key tile before it has, so the sum has one order
// whatever the threads do. By causality a task starts some query tiles later than its predecessor,
// so turns come almost without waiting.
struct KeyTile {
    Range keys;
    Range query_tiles;  // those whose key range meets `keys`
    int64_t index;      // within its sequence
    int64_t first_key;  // of its sequence
    int64_t kv_head;
};

struct Scratch {
    std::vector<float> q, dout, k, v, dk, dv, scores, dp;
    std::vector<Range> visible;

    explicit Scratch(const cpu::AttentionPlan& plan) {
        const auto sized = [](int64_t n) { return static_cast<size_t>(n); };
        const int64_t rows = plan.max_stacked_rows, keys = std::min(kTileKeys, plan.num_keys);
        q.resize(sized(rows * plan.head_size));
        dout.resize(sized(rows * plan.value_size));
        for (auto* of_keys : {&k, &dk}) of_keys->resize(sized(keys * plan.head_size));
        for (auto* of_values : {&v, &dv}) of_values->resize(sized(keys * plan.value_size));
        scores.resize(sized(rows * keys));
        dp.resize(scores.size());
        visible.resize(sized(rows));
    }
};

template <typename T>
class Backward {
public:
    explicit Backward(const SegmentAttentionBackwardParams& params)
        : params_(params), forward_(params.forward), plan_(params.forward, kStackedRows),
          d_(plan_.head_size), dv_(plan_.value_size), group_width_(plan_.heads_per_kv * d_),
          q_stride_(plan_.num_heads * d_), k_stride_(plan_.num_kv_heads * d_),
          out_width_(plan_.heads_per_kv * dv_), out_stride_(plan_.num_heads * dv_),
          v_stride_(plan_.num_kv_heads * dv_), stack_rows_(plan_.num_queries * plan_.heads_per_kv),
          log2_sum_(static_cast<size_t>(plan_.num_kv_heads * stack_rows_)),
          delta_(log2_sum_.size()), dq_(log2_sum_.size() * static_cast<size_t>(d_)),
          keys_(plan_.tiles.size() * static_cast<size_t>(plan_.num_kv_heads)),
          turns_(keys_.size()) {}

    void run() {
        prepare_rows();
        if (forward_.sinks) sum_sink_gradients();
        const std::vector<KeyTile> tasks = list_tasks();
        const int64_t num_tasks = static_cast<int64_t>(tasks.size());
        const int64_t workers = std::min<int64_t>(cpu::max_threads(), num_tasks);
        // A task waits only for tasks before it in the list, and workers take them in that order,
        // so the earliest unfinished one never waits. All memory is allocated before the first
        // task: a worker that threw would leave the others waiting.
        std::vector<Scratch> scratch(static_cast<size_t>(workers), Scratch(plan_));
        std::atomic<int64_t> next{0};
        cpu::parallel_for(workers, [&](int64_t worker, int) {
            for (int64_t i = next++; i < num_tasks; i = next++) {
                visit(tasks[static_cast<size_t>(i)], scratch[static_cast<size_t>(worker)]);
            }
        });
        store_dq();
    }

private:
    int64_t pair(int64_t tile, int64_t kv_head) const {
        return tile * plan_.num_kv_heads + kv_head;
    }

    /// Offset of a query row's stack in arrays of [num_kv_heads, stack_rows_].
    int64_t stack_offset(int64_t kv_head, int64_t row) const {
        return kv_head * stack_rows_ + row * plan_.heads_per_kv;
    }

    /// delta = dout . out and the logarithm of the row sums, in the stacked order of the tiles.
    void prepare_rows() {
        const T* out = forward_.out.template as<const T>();
        const T* dout = params_.dout.template as<const T>();
        const float* lse = forward_.lse.template as<const float>();
        cpu::parallel_ranges(plan_.num_queries, kStackedRows, [&](int64_t first, int64_t end) {
            for (int64_t row = first; row < end; ++row) {
                for (int64_t head = 0; head < plan_.num_heads; ++head) {
                    const int64_t at = row * out_stride_ + head * dv_;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t i = 0; i < dv_; ++i) {
                        sum += cpu::load(out[at + i]) * cpu::load(dout[at + i]);
                    }
                    const size_t to = static_cast<size_t>(
                        stack_offset(head / plan_.heads_per_kv, row) + head % plan_.heads_per_kv);
                    delta_[to] = sum;
                    log2_sum_[to] = cpu::kLog2E * lse[head * plan_.num_queries + row];
                }
            }
        });
    }

    /// The sink of a head has the probability exp(sink - lse) in each of its rows, and no value, so
    /// its score has the gradient -probability * delta.
    void sum_sink_gradients() {
        const float* sinks = forward_.sinks.template as<const float>();
        float* dsinks = params_.dsinks.template as<float>();
        cpu::parallel_for(plan_.num_heads, [&](int64_t head, int) {
            const float sink = cpu::kLog2E * sinks[head];
            double sum = 0.0;
            for (int64_t row = 0; row < plan_.num_queries; ++row) {
                const size_t at = static_cast<size_t>(stack_offset(head / plan_.heads_per_kv, row) +
                                                      head % plan_.heads_per_kv);
                if (std::isinf(log2_sum_[at])) continue;  // a row without any score
                sum -= std::exp2(sink - log2_sum_[at]) * delta_[at];
            }
            dsinks[head] = static_cast<float>(sum);
        });
    }

    /// Key tiles of every sequence and kv head; earlier key tiles, which most queries see, first.
    std::vector<KeyTile> list_tasks() {
        std::vector<KeyTile> tasks;
        for (size_t n = 0; n < plan_.sequence_tiles.size(); ++n) {
            const Range tiles = plan_.sequence_tiles[n], keys = plan_.sequence_keys[n];
            for (int64_t kv_head = 0; kv_head < plan_.num_kv_heads; ++kv_head) {
                for (int64_t tile = tiles.first; tile < tiles.end; ++tile) {
                    keys_[static_cast<size_t>(pair(tile, kv_head))] = plan_.keys(tile, kv_head);
                }
                for (int64_t first = keys.first; first < keys.end; first += kTileKeys) {
                    const Range mine{first, std::min(first + kTileKeys, keys.end)};
                    const int64_t index = (first - keys.first) / kTileKeys;
                    tasks.push_back({mine, tiles, index, keys.first, kv_head});
                }
            }
        }
        std::stable_sort(tasks.begin(), tasks.end(),
                         [](const KeyTile& a, const KeyTile& b) { return a.index < b.index; });
        return tasks;
    }

    void visit(const KeyTile& task, Scratch& scratch) {
        const int64_t num_keys = task.keys.end - task.keys.first;
        const int64_t k_first = task.keys.first * k_stride_ + task.kv_head * d_;
        const int64_t v_first = task.keys.first * v_stride_ + task.kv_head * dv_;
        cpu::load_rows(scratch.k.data(), forward_.k.template as<const T>() + k_first, num_keys,
                       k_stride_, d_);
        cpu::load_rows(scratch.v.data(), forward_.v.template as<const T>() + v_first, num_keys,
                       v_stride_, dv_);
        std::fill_n(scratch.dk.begin(), num_keys * d_, 0.0f);
        std::fill_n(scratch.dv.begin(), num_keys * dv_, 0.0f);
        for (int64_t tile = task.query_tiles.first; tile < task.query_tiles.end; ++tile) {
            visit_pair(task, tile, scratch);
        }
        // The queries carried the factor of the scores into dK, where scale belongs.
        const float factor = forward_.softcap > 0.0f ? forward_.softcap : cpu::kLn2;
        cpu::store_rows(params_.dk.template as<T>() + k_first, scratch.dk.data(), num_keys,
                        k_stride_, d_, factor);
        cpu::store_rows(params_.dv.template as<T>() + v_first, scratch.dv.data(), num_keys,
                        v_stride_, dv_);
    }

    void visit_pair(const KeyTile& task, int64_t tile, Scratch& scratch) {
        using cpu::Trans;
        const Range keys = keys_[static_cast<size_t>(pair(tile, task.kv_head))];
        if (keys.first >= task.keys.end || keys.end <= task.keys.first) return;
        const Range rows = plan_.tiles[static_cast<size_t>(tile)];
        const int64_t num_rows = rows.end - rows.first, stacked = num_rows * plan_.heads_per_kv;
        const int64_t n = std::min(task.keys.end, keys.end) - task.keys.first;
        const int64_t q_first = rows.first * q_stride_ + task.kv_head * group_width_;
        const int64_t out_first = rows.first * out_stride_ + task.kv_head * out_width_;
        const size_t stack = static_cast<size_t>(stack_offset(task.kv_head, rows.first));
        float* p = scratch.scores.data();
        float* ds = scratch.dp.data();

        cpu::load_rows(scratch.q.data(), forward_.q.template as<const T>() + q_first, num_rows,
                       q_stride_, group_width_, cpu::score_factor(forward_));
        cpu::load_rows(scratch.dout.data(), params_.dout.template as<const T>() + out_first,
                       num_rows, out_stride_, out_width_);
        plan_.stack_visible(tile, task.kv_head, scratch.visible.data());
        cpu::gemm(Trans::kNo, Trans::kYes, stacked, n, d_, 1.0f, scratch.q.data(), d_,
                  scratch.k.data(), d_, 0.0f, p, n);
        cpu::gemm(Trans::kNo, Trans::kYes, stacked, n, dv_, 1.0f, scratch.dout.data(), dv_,
                  scratch.v.data(), dv_, 0.0f, ds, n);
        cpu::softmax_backward_tile(
            {stacked, n, task.keys.first, scratch.visible.data(), forward_.softcap * cpu::kLog2E},
            p, ds, &log2_sum_[stack], &delta_[stack]);
        cpu::gemm(Trans::kYes, Trans::kNo, n, dv_, stacked, 1.0f, p, n, scratch.dout.data(), dv_,
                  1.0f, scratch.dv.data(), dv_);
        cpu::gemm(Trans::kYes, Trans::kNo, n, d_, stacked, 1.0f, ds, n, scratch.q.data(), d_, 1.0f,
                  scratch.dk.data(), d_);

        std::atomic<int64_t>& turn = turns_[static_cast<size_t>(pair(tile, task.kv_head))];
        const int64_t mine = task.index - (keys.first - task.first_key) / kTileKeys;
        for (int64_t now = turn.load(); now != mine; now = turn.load()) turn.wait(now);
        cpu::gemm(Trans::kNo, Trans::kNo, stacked, d_, n, 1.0f, ds, n, scratch.k.data(), d_, 1.0f,
                  &dq_[stack * static_cast<size_t>(d_)], d_);
        turn = mine + 1;
        turn.notify_all();
    }

    void store_dq() {
        const int64_t tasks = static_cast<int64_t>(plan_.tiles.size()) * plan_.num_kv_heads;
        cpu::parallel_for(tasks, [&](int64_t task, int) {
            const int64_t kv_head = task % plan_.num_kv_heads;
            const Range rows = plan_.tiles[static_cast<size_t>(task / plan_.num_kv_heads)];
            cpu::store_rows(
                params_.dq.template as<T>() + rows.first * q_stride_ + kv_head * group_width_,
                &dq_[static_cast<size_t>(stack_offset(kv_head, rows.first) * d_)],
                rows.end - rows.first, q_stride_, group_width_, forward_.scale);
        });
    }

    const SegmentAttentionBackwardParams& params_;
    const SegmentAttentionParams& forward_;
    const cpu::AttentionPlan plan_;
    // Head sizes of keys and values; a row's heads of a group, and all of its heads.
    const int64_t d_, dv_, group_width_, q_stride_, k_stride_;
    const int64_t out_width_, out_stride_, v_stride_, stack_rows_;
    std::vector<float> log2_sum_;              // [num_kv_heads, stack_rows_], log2 of the row sums
    std::vector<float> delta_;                 // [num_kv_heads, stack_rows_]
    std::vector<float> dq_;                    // [num_kv_heads, stack_rows_, d_], without the scale
    std::vector<Range> keys_;                  // of each query tile and kv head
    std::vector<std::atomic<int64_t>> turns_;  // key tiles added to each query tile's dQ so far
};

}  // namespace

void segment_attention_backward_cpu(const SegmentAttentionBackwardParams& params) {
    cpu::dispatch_float(params.forward.q.dtype, [&]<typename T>(T) { Backward<T>(params).run(); });
}

}  // namespace lemo
