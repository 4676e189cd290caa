#include "lemo/predictor.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "convert.h"
#include "gemm.h"
#include "lemo/blocks.h"
#include "lemo/check.h"
#include "multiversion.h"
#include "parallel.h"

namespace lemo {
namespace {

using cpu::Trans;

// Rows of x that one product covers.
constexpr int64_t kPanelRows = 256;

// The gradients are summed over fixed chunks of rows first and over the chunks then, so that
// neither timing nor the number of threads shows in the result. Each chunk holds a copy of them.
constexpr int64_t kMinChunkRows = 2 * kPanelRows;
constexpr int64_t kMaxChunks = 16;

LEMO_MULTIVERSION void relu(float* values, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) values[i] = values[i] > 0.0f ? values[i] : 0.0f;
}

/// gradient = from where the activation is positive, else 0. `from` may be `gradient`.
LEMO_MULTIVERSION void relu_backward(const float* activation, const float* from, int64_t n,
                                     float* gradient) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) gradient[i] = activation[i] > 0.0f ? from[i] : 0.0f;
}

LEMO_MULTIVERSION void add(const float* from, int64_t n, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

/// to += factor * from
LEMO_MULTIVERSION void add_scaled(const float* from, float factor, int64_t n, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

LEMO_MULTIVERSION float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

/// Activations of one panel of rows.
struct Hidden {
    std::vector<float> first, second;  // [rows, R1], [rows, R2]
};

/// The three maps of one predictor in fp32.
class Maps {
public:
    explicit Maps(const PredictorWeights& weights)
        : down_(weights.down), mid_(weights.mid), up_(weights.up), input_(weights.down.size(1)),
          first_(weights.down.size(0)), second_(weights.mid.size(0)), output_(weights.up.size(0)) {}

    int64_t first() const { return first_; }
    int64_t second() const { return second_; }
    int64_t output() const { return output_; }

    /// Both hidden activations of `rows` rows of x.
    void activate(const float* x, int64_t rows, Hidden& hidden) const {
        hidden.first.resize(static_cast<size_t>(rows * first_));
        hidden.second.resize(static_cast<size_t>(rows * second_));
        cpu::gemm(Trans::kNo, Trans::kYes, rows, first_, input_, 1.0f, x, input_, down_.data(),
                  input_, 0.0f, hidden.first.data(), first_);
        relu(hidden.first.data(), rows * first_);
        cpu::gemm(Trans::kNo, Trans::kYes, rows, second_, first_, 1.0f, hidden.first.data(), first_,
                  mid_.data(), first_, 0.0f, hidden.second.data(), second_);
        relu(hidden.second.data(), rows * second_);
    }

    /// [blocks, E]: up of the blocks' mean activations. The last map is linear, so it comes after
    /// the mean.
    std::vector<float> embed(const std::vector<float>& means, int64_t blocks) const {
        std::vector<float> result(static_cast<size_t>(blocks * output_));
        cpu::gemm(Trans::kNo, Trans::kYes, blocks, output_, second_, 1.0f, means.data(), second_,
                  up_.data(), second_, 0.0f, result.data(), output_);
        return result;
    }

    /// Turns d(embedding) [blocks, E] into dup and d(mean activations) [blocks, R2].
    std::vector<float> embed_backward(const std::vector<float>& dembedding,
                                      const std::vector<float>& means, int64_t blocks,
                                      float* dup) const {
        cpu::gemm(Trans::kYes, Trans::kNo, output_, second_, blocks, 1.0f, dembedding.data(),
                  output_, means.data(), second_, 0.0f, dup, second_);
        std::vector<float> dmeans(static_cast<size_t>(blocks * second_));
        cpu::gemm(Trans::kNo, Trans::kNo, blocks, second_, output_, 1.0f, dembedding.data(),
                  output_, up_.data(), second_, 0.0f, dmeans.data(), second_);
        return dmeans;
    }

    /// Adds one panel's share to ddown and dmid. `dsecond` [rows, R2] is the gradient of the second
    /// activations before their ReLU.
    void activate_backward(const float* x, const Hidden& hidden, const float* dsecond, int64_t rows,
                           std::vector<float>& dfirst, float* ddown, float* dmid) const {
        cpu::gemm(Trans::kYes, Trans::kNo, second_, first_, rows, 1.0f, dsecond, second_,
                  hidden.first.data(), first_, 1.0f, dmid, first_);
        dfirst.resize(static_cast<size_t>(rows * first_));
        cpu::gemm(Trans::kNo, Trans::kNo, rows, first_, second_, 1.0f, dsecond, second_,
                  mid_.data(), first_, 0.0f, dfirst.data(), first_);
        relu_backward(hidden.first.data(), dfirst.data(), rows * first_, dfirst.data());
        cpu::gemm(Trans::kYes, Trans::kNo, first_, input_, rows, 1.0f, dfirst.data(), first_, x,
                  input_, 1.0f, ddown, input_);
    }

private:
    cpu::Float32Array down_, mid_, up_;
    int64_t input_, first_, second_, output_;
};

/// A view of the op's arguments that both directions share.
struct Problem {
    explicit Problem(const PredictorParams& params)
        : x(params.x), start(params.block_starts.as<const int32_t>()),
          cut(params.cu_blocks.as<const int32_t>()), rows(params.x.size(0)),
          hidden(params.x.size(1)), blocks(params.block_starts.size(0) - 1),
          sequences(params.cu_blocks.size(0) - 1) {}

    Tensor x;
    const int32_t* start;
    const int32_t* cut;
    int64_t rows, hidden, blocks, sequences;
};

/// First blocks of groups of about kPanelRows rows, and the number of blocks at the end.
std::vector<int64_t> group_blocks(const Problem& problem) {
    std::vector<int64_t> groups{0};
    for (int64_t block = 0; block < problem.blocks; ++block) {
        if (problem.start[block + 1] - problem.start[groups.back()] > kPanelRows &&
            block > groups.back()) {
            groups.push_back(block);
        }
    }
    if (problem.blocks > 0) groups.push_back(problem.blocks);
    return groups;
}

/// means[p] [B, R2]: mean of the second activations of predictor p over each block.
std::vector<std::vector<float>> mean_activations(const Problem& problem,
                                                 const std::vector<const Maps*>& predictors) {
    std::vector<std::vector<float>> means;
    for (const Maps* maps : predictors) {
        means.emplace_back(static_cast<size_t>(problem.blocks * maps->second()));
    }
    const std::vector<int64_t> groups = group_blocks(problem);
    cpu::dispatch_float(problem.x.dtype, [&]<typename T>(T) {
        const T* x = problem.x.as<const T>();
        cpu::parallel_for(static_cast<int64_t>(groups.size()) - 1, [&](int64_t group, int) {
            std::vector<float> wide;
            Hidden hidden;
            const int64_t end = problem.start[groups[group + 1]];
            int64_t block = groups[group];
            for (int64_t i = problem.start[block]; i < end; i += kPanelRows) {
                const int64_t rows = std::min(kPanelRows, end - i);
                const float* panel =
                    cpu::as_float(x + i * problem.hidden, rows * problem.hidden, wide);
                const int64_t first_block = block;
                for (size_t p = 0; p < predictors.size(); ++p) {
                    const int64_t width = predictors[p]->second();
                    predictors[p]->activate(panel, rows, hidden);
                    block = first_block;
                    for (int64_t row = i; row < i + rows; ++row) {
                        while (row >= problem.start[block + 1]) ++block;
                        const float share = 1.0f / static_cast<float>(problem.start[block + 1] -
                                                                      problem.start[block]);
                        add_scaled(hidden.second.data() + (row - i) * width, share, width,
                                   means[p].data() + block * width);
                    }
                }
            }
        });
    });
    return means;
}

/// Visits the blocks of every sequence from its last to its first: visit(block, mean_query), where
/// `mean_query` [E] is the mean of the queries of the blocks from there on.
template <typename Visit>
void for_each_mean_query(const Problem& problem, const std::vector<float>& queries, int64_t width,
                         Visit&& visit) {
    std::vector<float> sum(static_cast<size_t>(width)), mean(sum);
    for (int64_t n = 0; n < problem.sequences; ++n) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t block = problem.cut[n + 1] - 1; block >= problem.cut[n]; --block) {
            const float count = static_cast<float>(problem.cut[n + 1] - block);
            add(queries.data() + block * width, width, sum.data());
            std::fill(mean.begin(), mean.end(), 0.0f);
            add_scaled(sum.data(), 1.0f / count, width, mean.data());
            visit(block, mean.data());
        }
    }
}

/// Gradients of one predictor's down and mid maps: sums over chunks of rows.
void maps_backward(const Problem& problem, const Maps& maps, const std::vector<float>& dmeans,
                   float* ddown, float* dmid) {
    const int64_t panels_per_chunk = ceil_div(ceil_div(problem.rows, kMaxChunks), kPanelRows);
    const int64_t chunk_rows = std::max(kMinChunkRows, panels_per_chunk * kPanelRows);
    const int64_t chunks = ceil_div(problem.rows, chunk_rows);
    const int64_t down_size = maps.first() * problem.hidden;
    const int64_t mid_size = maps.second() * maps.first();
    std::vector<float> parts(static_cast<size_t>(chunks * (down_size + mid_size)));

    cpu::dispatch_float(problem.x.dtype, [&]<typename T>(T) {
        const T* x = problem.x.as<const T>();
        cpu::parallel_for(chunks, [&](int64_t chunk, int) {
            float* down_part = parts.data() + chunk * (down_size + mid_size);
            std::vector<float> wide, dfirst, dsecond;
            Hidden hidden;
            const int64_t end = std::min(problem.rows, (chunk + 1) * chunk_rows);
            int64_t i = chunk * chunk_rows;
            int64_t block = std::upper_bound(problem.start, problem.start + problem.blocks, i) -
                            problem.start - 1;
            for (; i < end; i += kPanelRows) {
                const int64_t rows = std::min(kPanelRows, end - i), width = maps.second();
                const float* panel =
                    cpu::as_float(x + i * problem.hidden, rows * problem.hidden, wide);
                maps.activate(panel, rows, hidden);
                dsecond.resize(static_cast<size_t>(rows * width));
                for (int64_t row = i; row < i + rows; ++row) {
                    while (row >= problem.start[block + 1]) ++block;
                    relu_backward(hidden.second.data() + (row - i) * width,
                                  dmeans.data() + block * width, width,
                                  dsecond.data() + (row - i) * width);
                }
                maps.activate_backward(panel, hidden, dsecond.data(), rows, dfirst, down_part,
                                       down_part + down_size);
            }
        });
    });

    std::fill_n(ddown, down_size, 0.0f);
    std::fill_n(dmid, mid_size, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* part = parts.data() + chunk * (down_size + mid_size);
        add(part, down_size, ddown);
        add(part + down_size, mid_size, dmid);
    }
}

/// All gradients of one predictor from those of its embeddings [B, E].
void predictor_gradients(const Problem& problem, const Maps& maps, const std::vector<float>& means,
                         const std::vector<float>& dembedding, const PredictorWeights& gradients) {
    std::vector<float> dmeans =
        maps.embed_backward(dembedding, means, problem.blocks, gradients.up.as<float>());
    for (int64_t block = 0; block < problem.blocks; ++block) {
        const float count = static_cast<float>(problem.start[block + 1] - problem.start[block]);
        float* row = dmeans.data() + block * maps.second();
        for (int64_t i = 0; i < maps.second(); ++i) row[i] /= count;
    }
    maps_backward(problem, maps, dmeans, gradients.down.as<float>(), gradients.mid.as<float>());
}

void check_maps(const Checker& check, const Tensor& x, const PredictorWeights& weights,
                const char* down, const char* mid, const char* up) {
    check.floating(down, weights.down, 2);
    check.floating(mid, weights.mid, 2);
    check.floating(up, weights.up, 2);
    check.dim(down, weights.down, 1, x.size(1), "the hidden size of 'x'");
    for (const auto& [argument, map] :
         {std::pair{down, &weights.down}, {mid, &weights.mid}, {up, &weights.up}}) {
        check.that(map->size(0) >= 1, argument, "at least one row", *map);
    }
    check.dim(mid, weights.mid, 1, weights.down.size(0),
              [&] { return std::string("the rows of '") + down + "'"; });
    check.dim(up, weights.up, 1, weights.mid.size(0),
              [&] { return std::string("the rows of '") + mid + "'"; });
    check.same_device({{"x", &x}, {down, &weights.down}, {mid, &weights.mid}, {up, &weights.up}});
}

/// What both directions take.
void check_arguments(const Checker& check, const PredictorParams& params) {
    check.floating("x", params.x, 2);
    check.that(params.x.size(1) >= 1, "x", "a hidden size of at least 1", params.x);
    check_maps(check, params.x, params.key, "k_down", "k_mid", "k_up");
    const PredictorWeights& query = params.query;
    if (query.down) {
        check.that(query.mid.given(), "q_mid", "a tensor, as 'q_down' is one", "None");
        check.that(query.up.given(), "q_up", "a tensor, as 'q_down' is one", "None");
        check_maps(check, params.x, query, "q_down", "q_mid", "q_up");
        check.dim("q_up", query.up, 0, params.key.up.size(0), "the rows of 'k_up'");
    } else {
        check.that(!query.mid, "q_mid", "None, as 'q_down' is", query.mid);
        check.that(!query.up, "q_up", "None, as 'q_down' is", query.up);
        check.dim("k_up", params.key.up, 0, 1, "one score, as there is no query predictor");
    }
    check.same_device({{"x", &params.x},
                       {"block_starts", &params.block_starts},
                       {"cu_blocks", &params.cu_blocks}});
    check.layout(params.block_starts, params.cu_blocks, params.x.size(0));
}

}  // namespace

void check(const PredictorParams& params) {
    const Checker check("predictor");
    check_arguments(check, params);
    check.typed("scores", params.scores, DType::kFloat32, 1);
    check.dim("scores", params.scores, 0, params.block_starts.size(0) - 1, "the number of blocks");
}

void check(const PredictorBackwardParams& params) {
    const Checker check("predictor_backward");
    check_arguments(check, params.forward);
    check.typed("dscores", params.dscores, DType::kFloat32, 1);
    check.same_device({{"x", &params.forward.x}, {"dscores", &params.dscores}});
    check.dim("dscores", params.dscores, 0, params.forward.block_starts.size(0) - 1,
              "the number of blocks");
}

void predictor_cpu(const PredictorParams& params) {
    const Problem problem(params);
    const Maps key(params.key);
    std::optional<Maps> query;
    std::vector<const Maps*> predictors{&key};
    if (params.query.down) predictors.push_back(&query.emplace(params.query));
    const auto means = mean_activations(problem, predictors);

    const std::vector<float> keys = key.embed(means[0], problem.blocks);
    float* score = params.scores.as<float>();
    if (!query) {
        std::copy(keys.begin(), keys.end(), score);
        return;
    }
    const int64_t width = key.output();
    for_each_mean_query(problem, query->embed(means[1], problem.blocks), width,
                        [&](int64_t block, const float* mean_query) {
                            score[block] = dot(keys.data() + block * width, mean_query, width);
                        });
}

void predictor_backward_cpu(const PredictorBackwardParams& params) {
    const Problem problem(params.forward);
    const Maps key(params.forward.key);
    std::optional<Maps> query;
    std::vector<const Maps*> predictors{&key};
    if (params.forward.query.down) predictors.push_back(&query.emplace(params.forward.query));
    const auto means = mean_activations(problem, predictors);

    const float* dscore = params.dscores.as<const float>();
    if (!query) {
        const std::vector<float> dkeys(dscore, dscore + problem.blocks);
        predictor_gradients(problem, key, means[0], dkeys, params.dkey);
        return;
    }
    const int64_t width = key.output();
    std::vector<float> dkeys(static_cast<size_t>(problem.blocks * width)), dqueries(dkeys);
    for_each_mean_query(problem, query->embed(means[1], problem.blocks), width,
                        [&](int64_t block, const float* mean_query) {
                            add_scaled(mean_query, dscore[block], width,
                                       dkeys.data() + block * width);
                        });
    // score[n] = k_n . sum of q_m / (blocks from n on), m >= n: dq_m sums over the blocks n <= m.
    const std::vector<float> keys = key.embed(means[0], problem.blocks);
    for (int64_t n = 0; n < problem.sequences; ++n) {
        const float* before = nullptr;
        for (int64_t block = problem.cut[n]; block < problem.cut[n + 1]; ++block) {
            float* dquery = dqueries.data() + block * width;
            if (before != nullptr) std::copy_n(before, width, dquery);
            const float count = static_cast<float>(problem.cut[n + 1] - block);
            add_scaled(keys.data() + block * width, dscore[block] / count, width, dquery);
            before = dquery;
        }
    }
    predictor_gradients(problem, key, means[0], dkeys, params.dkey);
    predictor_gradients(problem, *query, means[1], dqueries, params.dquery);
}

}  // namespace lemo
