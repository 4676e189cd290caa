#include "lemo/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "convert.h"
#include "exp2.h"
#include "gemm.h"
#include "lemo/blocks.h"
#include "lemo/check.h"
#include "multiversion.h"
#include "parallel.h"

namespace lemo {
namespace {

// Panels of the products. Weights are stored in bf16 but multiplied in fp32: a panel is converted
// once and meets every row it can before it leaves the L2 cache.
constexpr int64_t kVocabPanel = 512;
constexpr int64_t kRowPanel = 256;
constexpr int64_t kHiddenPanel = 384;
// Between rows of logits, so that a power-of-two vocabulary does not map them all to one cache set.
constexpr int64_t kRowPadding = 16;

/// Cross entropy of one row; `logits` become softmax(logits) - one_hot(label).
LEMO_MULTIVERSION
float row_loss(float* logits, int64_t vocabulary, int64_t label) {
    float top = logits[0];
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < vocabulary; ++i) top = logits[i] > top ? logits[i] : top;
    const float picked = logits[label] - top;
    double sum = 0.0;
    for (int64_t first = 0; first < vocabulary; first += kVocabPanel) {
        const int64_t end = std::min(first + kVocabPanel, vocabulary);
        float partial = 0.0f;
#pragma omp simd reduction(+ : partial)
        for (int64_t i = first; i < end; ++i) {
            logits[i] = cpu::exp2_fast((logits[i] - top) * cpu::kLog2E);
            partial += logits[i];
        }
        sum += partial;
    }
    const float factor = static_cast<float>(1.0 / sum);
#pragma omp simd
    for (int64_t i = 0; i < vocabulary; ++i) logits[i] *= factor;
    logits[label] -= 1.0f;
    return static_cast<float>(std::log(sum)) - picked;
}

/// `sums` [columns] += the sum of `rows` rows.
LEMO_MULTIVERSION
void add_rows(float* sums, const float* from, int64_t rows, int64_t stride, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) sums[i] += from[r * stride + i];
    }
}

void add_row(float* to, const float* from, int64_t n) { add_rows(to, from, 1, n, n); }

class ChunkedLoss {
public:
    explicit ChunkedLoss(const LinearCrossEntropyParams& params)
        : params_(params), rows_(params.hidden.size(0)), hidden_size_(params.hidden.size(1)),
          vocabulary_(params.weight.size(0)), stride_(vocabulary_ + kRowPadding),
          label_(params.labels.as<const int64_t>()),
          scratch_(static_cast<size_t>(cpu::max_threads())) {}

    void run() {
        list_rows();
        const int64_t count = static_cast<int64_t>(used_.size());
        const int64_t chunk = std::min(params_.chunk_rows, count);
        hidden_.resize(static_cast<size_t>(chunk * hidden_size_));
        logits_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(chunk * stride_));
        losses_.resize(static_cast<size_t>(chunk));
        start_weight_gradients();

        double loss = 0.0;
        for (int64_t first = 0; first < count; first += chunk) {
            const int64_t end = std::min(first + chunk, count);
            const int64_t* used = used_.data() + first;
            load_hidden(used, end - first);
            compute_logits(end - first);
            cpu::parallel_for(end - first, [&](int64_t r, int) {
                losses_[static_cast<size_t>(r)] =
                    row_loss(logits_.get() + r * stride_, vocabulary_, label_[used[r]]);
            });
            for (int64_t r = 0; r < end - first; ++r) loss += losses_[static_cast<size_t>(r)];
            if (params_.dhidden) store_hidden_gradient(used, end - first);
            if (params_.dweight) add_weight_gradients(end - first);
        }
        *params_.loss.as<float>() = static_cast<float>(loss);
        *params_.count.as<int64_t>() = count;
        store_weight_gradients();
    }

private:
    /// The rows whose label counts; the gradient of every other row is 0.
    void list_rows() {
        for (int64_t r = 0; r < rows_; ++r) {
            if (label_[r] != params_.ignore_index) used_.push_back(r);
        }
        if (!params_.dhidden || static_cast<int64_t>(used_.size()) == rows_) return;
        cpu::dispatch_float(params_.dhidden.dtype, [&]<typename T>(T) {
            T* to = params_.dhidden.as<T>();
            for (int64_t r = 0; r < rows_; ++r) {
                if (label_[r] != params_.ignore_index) continue;
                std::fill_n(to + r * hidden_size_, hidden_size_, T{});
            }
        });
    }

    void load_hidden(const int64_t* used, int64_t rows) {
        cpu::dispatch_float(params_.hidden.dtype, [&]<typename T>(T) {
            const T* from = params_.hidden.as<const T>();
            cpu::parallel_ranges(rows, kRowPanel, [&](int64_t first, int64_t end) {
                for (int64_t r = first; r < end; ++r) {
                    cpu::load_row(hidden_.data() + r * hidden_size_, from + used[r] * hidden_size_,
                                  hidden_size_);
                }
            });
        });
    }

    /// `width` columns, from `column` on, of weight rows [first, end), in the thread's scratch.
    const float* load_weight(int64_t first, int64_t end, int64_t column, int64_t width,
                             int thread) {
        std::vector<float>& panel = scratch_[static_cast<size_t>(thread)];
        panel.resize(std::max(panel.size(), static_cast<size_t>((end - first) * width)));
        cpu::dispatch_float(params_.weight.dtype, [&]<typename T>(T) {
            const T* from = params_.weight.as<const T>() + first * hidden_size_ + column;
            cpu::load_rows(panel.data(), from, end - first, hidden_size_, width);
        });
        return panel.data();
    }

    /// body(first, end, thread) for every panel of the vocabulary, in parallel.
    template <typename Body>
    void for_vocabulary_panels(Body&& body) {
        cpu::parallel_for(ceil_div(vocabulary_, kVocabPanel), [&](int64_t panel, int thread) {
            const int64_t first = panel * kVocabPanel;
            body(first, std::min(first + kVocabPanel, vocabulary_), thread);
        });
    }

    void compute_logits(int64_t rows) {
        for_vocabulary_panels([&](int64_t first, int64_t end, int thread) {
            const float* weight = load_weight(first, end, 0, hidden_size_, thread);
            cpu::gemm(cpu::Trans::kNo, cpu::Trans::kYes, rows, end - first, hidden_size_, 1.0f,
                      hidden_.data(), hidden_size_, weight, hidden_size_, 0.0f,
                      logits_.get() + first, stride_);
            if (!params_.bias) return;
            std::vector<float> bias(static_cast<size_t>(end - first));
            cpu::dispatch_float(params_.bias.dtype, [&]<typename T>(T) {
                cpu::load_row(bias.data(), params_.bias.as<const T>() + first, end - first);
            });
            for (int64_t r = 0; r < rows; ++r) {
                add_row(logits_.get() + r * stride_ + first, bias.data(), end - first);
            }
        });
    }

    void store_hidden_gradient(const int64_t* used, int64_t rows) {
        const int64_t row_panels = ceil_div(rows, kRowPanel);
        const int64_t column_panels = ceil_div(hidden_size_, kHiddenPanel);
        std::vector<std::vector<float>> sums(scratch_.size());
        cpu::parallel_for(row_panels * column_panels, [&](int64_t task, int thread) {
            const int64_t row = task / column_panels * kRowPanel;
            const int64_t column = task % column_panels * kHiddenPanel;
            const int64_t height = std::min(kRowPanel, rows - row);
            const int64_t width = std::min(kHiddenPanel, hidden_size_ - column);
            std::vector<float>& sum = sums[static_cast<size_t>(thread)];
            sum.assign(static_cast<size_t>(height * width), 0.0f);
            for (int64_t first = 0; first < vocabulary_; first += kVocabPanel) {
                const int64_t end = std::min(first + kVocabPanel, vocabulary_);
                const float* weight = load_weight(first, end, column, width, thread);
                cpu::gemm(cpu::Trans::kNo, cpu::Trans::kNo, height, width, end - first, 1.0f,
                          logits_.get() + row * stride_ + first, stride_, weight, width, 1.0f,
                          sum.data(), width);
            }
            cpu::dispatch_float(params_.dhidden.dtype, [&]<typename T>(T) {
                T* to = params_.dhidden.as<T>();
                for (int64_t r = 0; r < height; ++r) {
                    cpu::store_row(to + used[row + r] * hidden_size_ + column,
                                   sum.data() + r * width, width);
                }
            });
        });
    }

    /// Sums over chunks are fp32; a gradient that is stored in fp32 is its own accumulator.
    void start_weight_gradients() {
        const auto start = [](const Tensor& gradient, std::vector<float>& buffer) -> float* {
            if (!gradient) return nullptr;
            const bool in_place = gradient.dtype == DType::kFloat32;
            if (!in_place) buffer.resize(static_cast<size_t>(gradient.num_elements()));
            float* sums = in_place ? gradient.as<float>() : buffer.data();
            std::fill_n(sums, gradient.num_elements(), 0.0f);
            return sums;
        };
        dweight_ = start(params_.dweight, dweight_buffer_);
        dbias_ = start(params_.dbias, dbias_buffer_);
    }

    void add_weight_gradients(int64_t rows) {
        for_vocabulary_panels([&](int64_t first, int64_t end, int) {
            cpu::gemm(cpu::Trans::kYes, cpu::Trans::kNo, end - first, hidden_size_, rows, 1.0f,
                      logits_.get() + first, stride_, hidden_.data(), hidden_size_, 1.0f,
                      dweight_ + first * hidden_size_, hidden_size_);
            if (dbias_) add_rows(dbias_ + first, logits_.get() + first, rows, stride_, end - first);
        });
    }

    void store_weight_gradients() {
        const auto finish = [](const Tensor& gradient, const std::vector<float>& buffer) {
            if (buffer.empty()) return;
            cpu::dispatch_float(gradient.dtype, [&]<typename T>(T) {
                cpu::store_row(gradient.as<T>(), buffer.data(), gradient.num_elements());
            });
        };
        finish(params_.dweight, dweight_buffer_);
        finish(params_.dbias, dbias_buffer_);
    }

    const LinearCrossEntropyParams& params_;
    const int64_t rows_, hidden_size_, vocabulary_, stride_;
    const int64_t* label_;
    std::vector<int64_t> used_;  // rows whose label counts
    std::vector<float> hidden_;  // [chunk, H]
    std::vector<float> losses_;  // [chunk]
    // [chunk, stride_]: logits, then their gradients. Large: left uninitialised.
    std::unique_ptr<float[]> logits_;
    std::vector<float> dweight_buffer_, dbias_buffer_;
    float* dweight_ = nullptr;
    float* dbias_ = nullptr;
    std::vector<std::vector<float>> scratch_;  // a weight panel for each thread
};

}  // namespace

void check(const LinearCrossEntropyParams& p) {
    const Checker check("linear_cross_entropy");
    check.floating("hidden", p.hidden, 2);
    check.floating("weight", p.weight, 2);
    check.that(p.hidden.size(1) >= 1, "hidden", "a hidden size of at least 1", p.hidden);
    check.dim("weight", p.weight, 1, p.hidden.size(1), "the hidden size of 'hidden'");
    check.that(p.weight.size(0) >= 1, "weight", "a vocabulary of at least 1", "0");
    if (p.bias) {
        check.floating("bias", p.bias, 1);
        check.dim("bias", p.bias, 0, p.weight.size(0), "the vocabulary of 'weight'");
    }
    check.typed("labels", p.labels, DType::kInt64, 1);
    check.dim("labels", p.labels, 0, p.hidden.size(0), "the rows of 'hidden'");
    check.same_device(
        {{"hidden", &p.hidden}, {"weight", &p.weight}, {"bias", &p.bias}, {"labels", &p.labels}});
    check.that(p.chunk_rows >= 1, "chunk_rows", "at least 1", p.chunk_rows);
    if (p.labels.device != Device::kCpu) return;
    const int64_t* label = p.labels.as<const int64_t>();
    for (int64_t r = 0; r < p.labels.size(0); ++r) {
        if (label[r] == p.ignore_index || (label[r] >= 0 && label[r] < p.weight.size(0))) continue;
        check.fail("labels",
                   "labels in [0, " + std::to_string(p.weight.size(0)) + ") or ignore_index " +
                       std::to_string(p.ignore_index),
                   std::to_string(label[r]) + " at index " + std::to_string(r));
    }
}

void linear_cross_entropy_cpu(const LinearCrossEntropyParams& params) { ChunkedLoss(params).run(); }

}  // namespace lemo
