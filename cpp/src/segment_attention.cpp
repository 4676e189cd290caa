#include "lemo/segment_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_plan.h"
#include "attention_tile.h"
#include "convert.h"
#include "exp2.h"
#include "gemm.h"
#include "lemo/check.h"
#include "parallel.h"

namespace lemo {
namespace {

// Tall enough that BLAS runs near its peak, small enough that scores, values and sums of a tile
// stay in a core's 1 MiB of L2.
constexpr int64_t kStackedRows = 192;
constexpr int64_t kTileKeys = 512;

void check_positions(const Checker& check, const char* argument, const Tensor& positions,
                     const Tensor& cuts, int64_t num_rows) {
    check.typed(argument, positions, DType::kInt32, 1);
    check.dim(argument, positions, 0, num_rows, "one position for each row");
    if (positions.device != Device::kCpu || cuts.device != Device::kCpu) return;
    const int32_t* position = positions.as<const int32_t>();
    const int32_t* cut = cuts.as<const int32_t>();
    for (int64_t n = 0; n + 1 < cuts.size(0); ++n) {
        int64_t previous = -1;
        for (int64_t row = cut[n]; row < cut[n + 1]; ++row) {
            if (position[row] <= previous) {
                check.fail(argument, "strictly ascending positions, from 0 on, in each sequence",
                           std::to_string(position[row]) + " after " + std::to_string(previous) +
                               " at index " + std::to_string(row));
            }
            previous = position[row];
        }
    }
}

void check_forward(const Checker& check, const SegmentAttentionParams& p) {
    check.floating("q", p.q, 3);
    check.floating("k", p.k, 3);
    check.floating("v", p.v, 3);
    check.same_dtype("k", p.k, "q", p.q);
    check.same_dtype("v", p.v, "q", p.q);
    check.heads(p.q, p.k);
    for (int i = 0; i < 2; ++i) check.dim("v", p.v, i, p.k.size(i), "as in 'k'");
    check.that(p.v.size(2) >= 1, "v", "a head size of at least 1", p.v);
    check.same_device({{"q", &p.q},
                       {"k", &p.k},
                       {"v", &p.v},
                       {"cu_q", &p.cu_q},
                       {"cu_k", &p.cu_k},
                       {"q_positions", &p.q_positions},
                       {"k_positions", &p.k_positions},
                       {"sinks", &p.sinks}});
    check.cuts("cu_q", p.cu_q, p.q.size(0), /*strict=*/false);
    check.cuts("cu_k", p.cu_k, p.k.size(0), /*strict=*/false);
    check.dim("cu_k", p.cu_k, 0, p.cu_q.size(0), "as 'cu_q'");
    check.that(p.q_positions.given() == p.k_positions.given(),
               p.q_positions ? "k_positions" : "q_positions", "positions of both sides or of none",
               "None");
    if (p.q_positions) {
        check_positions(check, "q_positions", p.q_positions, p.cu_q, p.q.size(0));
        check_positions(check, "k_positions", p.k_positions, p.cu_k, p.k.size(0));
    }
    check.that(std::isfinite(p.scale), "scale", "a finite number", p.scale);
    check.that(p.window >= 0, "window", "at least 0", p.window);
    check.that(p.group_size >= 0, "group_size", "at least 0", p.group_size);
    check.that(std::isfinite(p.softcap) && p.softcap >= 0, "softcap",
               "a finite number of at least 0", p.softcap);
    if (p.sinks) {
        check.typed("sinks", p.sinks, DType::kFloat32, 1);
        check.dim("sinks", p.sinks, 0, p.q.size(1), "the heads of 'q'");
    }
    check.that(p.q.device != Device::kCpu || p.kernel == "auto", "kernel", "'auto' on the CPU",
               [&] { return quoted(p.kernel); });
}

void check_like(const Checker& check, const char* argument, const Tensor& tensor,
                const char* other_argument, const Tensor& other) {
    check.floating(argument, tensor, other.ndim);
    check.same_dtype(argument, tensor, other_argument, other);
    check.same_device({{other_argument, &other}, {argument, &tensor}});
    for (int i = 0; i < other.ndim; ++i) {
        check.dim(argument, tensor, i, other.size(i),
                  [&] { return std::string("as in '") + other_argument + "'"; });
    }
}

/// `tensor` belongs to the output: rows and heads of the queries, columns of the values.
void check_output(const Checker& check, const char* argument, const Tensor& tensor,
                  const SegmentAttentionParams& p) {
    check.floating(argument, tensor, 3);
    check.same_dtype(argument, tensor, "q", p.q);
    check.same_device({{"q", &p.q}, {argument, &tensor}});
    for (int i = 0; i < 2; ++i) check.dim(argument, tensor, i, p.q.size(i), "as in 'q'");
    check.dim(argument, tensor, 2, p.v.size(2), "as in 'v'");
}

void check_results(const Checker& check, const SegmentAttentionParams& p) {
    check_output(check, "out", p.out, p);
    check.typed("lse", p.lse, DType::kFloat32, 2);
    check.same_device({{"q", &p.q}, {"lse", &p.lse}});
    check.dim("lse", p.lse, 0, p.q.size(1), "the heads of 'q'");
    check.dim("lse", p.lse, 1, p.q.size(0), "the rows of 'q'");
}

/// What one thread works on, allocated once for all of its tiles.
struct Scratch {
    std::vector<float> q, k, v, scores, out, row_max, row_sum;
    std::vector<Range> visible;

    void fit(const cpu::AttentionPlan& plan) {
        const auto sized = [](int64_t n) { return static_cast<size_t>(n); };
        const int64_t rows = plan.max_stacked_rows, keys = std::min(kTileKeys, plan.num_keys);
        q.resize(sized(rows * plan.head_size));
        out.resize(sized(rows * plan.value_size));
        k.resize(sized(keys * plan.head_size));
        v.resize(sized(keys * plan.value_size));
        scores.resize(sized(rows * keys));
        row_max.resize(sized(rows));
        row_sum.resize(sized(rows));
        visible.resize(sized(rows));
    }
};

/// One query tile against every key its rows see: the flash recurrence in fp32.
template <typename T>
void attend(const SegmentAttentionParams& params, const cpu::AttentionPlan& plan, int64_t tile,
            int64_t kv_head, Scratch& scratch) {
    using cpu::Trans;
    const Range rows = plan.tiles[static_cast<size_t>(tile)];
    const Range keys = plan.keys(tile, kv_head);
    const int64_t num_rows = rows.end - rows.first, d = plan.head_size, dv = plan.value_size;
    const int64_t group_width = plan.heads_per_kv * d, stacked = num_rows * plan.heads_per_kv;
    const int64_t q_stride = plan.num_heads * d, k_stride = plan.num_kv_heads * d;
    const int64_t out_width = plan.heads_per_kv * dv, out_stride = plan.num_heads * dv;
    const int64_t v_stride = plan.num_kv_heads * dv;
    float* out = scratch.out.data();

    cpu::load_rows(scratch.q.data(),
                   params.q.as<const T>() + rows.first * q_stride + kv_head * group_width, num_rows,
                   q_stride, group_width, cpu::score_factor(params));
    std::fill_n(out, stacked * dv, 0.0f);
    // A sink is a score that was seen before all keys.
    const float* sinks = params.sinks.as<const float>();
    for (int64_t i = 0; i < stacked; ++i) {
        const int64_t head = kv_head * plan.heads_per_kv + i % plan.heads_per_kv;
        const size_t at = static_cast<size_t>(i);
        scratch.row_max[at] =
            sinks ? cpu::kLog2E * sinks[head] : -std::numeric_limits<float>::infinity();
        scratch.row_sum[at] = sinks ? 1.0f : 0.0f;
    }
    plan.stack_visible(tile, kv_head, scratch.visible.data());

    for (int64_t first = keys.first; first < keys.end; first += kTileKeys) {
        const int64_t n = std::min(kTileKeys, keys.end - first);
        cpu::load_rows(scratch.k.data(), params.k.as<const T>() + first * k_stride + kv_head * d, n,
                       k_stride, d);
        cpu::load_rows(scratch.v.data(), params.v.as<const T>() + first * v_stride + kv_head * dv,
                       n, v_stride, dv);
        cpu::gemm(Trans::kNo, Trans::kYes, stacked, n, d, 1.0f, scratch.q.data(), d,
                  scratch.k.data(), d, 0.0f, scratch.scores.data(), n);
        cpu::softmax_tile({stacked, n, first, scratch.visible.data(), params.softcap * cpu::kLog2E},
                          scratch.scores.data(), scratch.row_max.data(), scratch.row_sum.data(),
                          out, dv);
        cpu::gemm(Trans::kNo, Trans::kNo, stacked, dv, n, 1.0f, scratch.scores.data(), n,
                  scratch.v.data(), dv, 1.0f, out, dv);
    }

    float* lse = params.lse.as<float>();
    for (int64_t i = 0; i < stacked; ++i) {
        const float sum = scratch.row_sum[static_cast<size_t>(i)];
        const float top = scratch.row_max[static_cast<size_t>(i)];
        const int64_t head = kv_head * plan.heads_per_kv + i % plan.heads_per_kv;
        const int64_t row = rows.first + i / plan.heads_per_kv;
        // A row without any score has top -inf, and so lse -inf, and out 0.
        lse[head * plan.num_queries + row] = cpu::kLn2 * top + (sum == 0.0f ? 0.0f : std::log(sum));
        const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
        for (int64_t c = 0; c < dv; ++c) out[i * dv + c] *= factor;
    }
    cpu::store_rows(params.out.as<T>() + rows.first * out_stride + kv_head * out_width, out,
                    num_rows, out_stride, out_width);
}

}  // namespace

void check(const SegmentAttentionParams& params) {
    const Checker check("segment_attention");
    check_forward(check, params);
    check_results(check, params);
}

void check(const SegmentAttentionBackwardParams& params) {
    const Checker check("segment_attention_backward");
    const SegmentAttentionParams& forward = params.forward;
    check_forward(check, forward);
    check_results(check, forward);
    check_output(check, "dout", params.dout, forward);
    check_like(check, "dq", params.dq, "q", forward.q);
    check_like(check, "dk", params.dk, "k", forward.k);
    check_like(check, "dv", params.dv, "v", forward.v);
    check.that(params.dsinks.given() == forward.sinks.given(), "dsinks",
               "a tensor if and only if 'sinks' is one", params.dsinks ? "a tensor" : "None");
    if (params.dsinks) {
        check.typed("dsinks", params.dsinks, DType::kFloat32, 1);
        check.dim("dsinks", params.dsinks, 0, forward.q.size(1), "the heads of 'q'");
    }
}

void segment_attention_cpu(const SegmentAttentionParams& params) {
    const cpu::AttentionPlan plan(params, kStackedRows);
    std::vector<Scratch> scratch(static_cast<size_t>(cpu::max_threads()));
    const int64_t num_tiles = static_cast<int64_t>(plan.tiles.size());
    const int64_t tasks = num_tiles * plan.num_kv_heads;
    cpu::dispatch_float(params.q.dtype, [&]<typename T>(T) {
        cpu::parallel_for(tasks, [&](int64_t task, int thread) {
            Scratch& mine = scratch[static_cast<size_t>(thread)];
            mine.fit(plan);
            // The last tiles of a sequence see most keys; starting with them evens out the threads.
            const int64_t tile = num_tiles - 1 - task / plan.num_kv_heads;
            attend<T>(params, plan, tile, task % plan.num_kv_heads, mine);
        });
    });
}

}  // namespace lemo
