#include "lemo/select_norm.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "convert.h"
#include "lemo/blocks.h"
#include "lemo/check.h"
#include "multiversion.h"
#include "parallel.h"

namespace lemo {
namespace {

constexpr char kRms[] = "rms";
constexpr char kLayer[] = "layer";

// Rows a thread should own before a second one pays.
constexpr int64_t kRowsPerThread = 32;

// dweight is summed over fixed ranges of rows first and over the ranges then, so that neither
// timing nor the number of threads shows in the result.
constexpr int64_t kMinRangeRows = 256;
constexpr int64_t kMaxRanges = 64;

void check_kind(const Checker& check, std::string_view kind) {
    check.that(kind == kRms || kind == kLayer, "kind", "'rms' or 'layer'",
               [&] { return quoted(kind); });
}

/// The shapes that both directions share; `residual` is x or dx. Returns the number of rows.
int64_t check_rows(const Checker& check, const char* residual_name, const Tensor& residual,
                   const Tensor& rows, const Tensor& weight) {
    check.floating(residual_name, residual, 2);
    check.that(residual.size(1) >= 1, residual_name, "a hidden size of at least 1", residual);
    check.floating("weight", weight, 1);
    check.dim("weight", weight, 0, residual.size(1), "the hidden size of the residual");
    check.same_device({{residual_name, &residual}, {"rows", &rows}, {"weight", &weight}});
    if (!rows) return residual.size(0);
    check.typed("rows", rows, DType::kInt32, 1);
    check.ascending_rows("rows", rows, residual.size(0));
    return rows.size(0);
}

void check_packed(const Checker& check, const char* argument, const Tensor& packed,
                  const char* residual_name, const Tensor& residual, int64_t num_rows) {
    check.floating(argument, packed, 2);
    check.same_dtype(argument, packed, residual_name, residual);
    check.same_device({{residual_name, &residual}, {argument, &packed}});
    check.dim(argument, packed, 0, num_rows, "the number of selected rows");
    check.dim(argument, packed, 1, residual.size(1), "the hidden size of the residual");
}

void check_statistics(const Checker& check, std::string_view kind, const Tensor& mean,
                      const Tensor& rstd, int64_t num_rows) {
    check.typed("mean", mean, DType::kFloat32, 1);
    check.dim("mean", mean, 0, kind == kLayer ? num_rows : 0,
              "the number of selected rows for kind 'layer', else 0");
    check.typed("rstd", rstd, DType::kFloat32, 1);
    check.dim("rstd", rstd, 0, num_rows, "the number of selected rows");
}

/// Normalises one row. `wide` holds `hidden` floats; `mean` is null for RMSNorm.
template <typename T>
LEMO_MULTIVERSION void normalise_row(const T* x, const float* weight, const float* bias, float eps,
                                     int64_t hidden, float* wide, T* y, float* mean, float* rstd) {
    cpu::load_row(wide, x, hidden);
    if (mean != nullptr) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < hidden; ++i) sum += wide[i];
        *mean = sum / static_cast<float>(hidden);
        for (int64_t i = 0; i < hidden; ++i) wide[i] -= *mean;
    }
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < hidden; ++i) squares += wide[i] * wide[i];
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(hidden) + eps);
    *rstd = scale;
    if (bias != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < hidden; ++i) {
            cpu::store(y + i, wide[i] * scale * weight[i] + bias[i]);
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < hidden; ++i) cpu::store(y + i, wide[i] * scale * weight[i]);
    }
}

/// Adds one row's gradient into dx. `normal` and `wide_dy` hold `hidden` floats and are left with
/// the normalised row and dy, from which the caller sums dweight and dbias.
template <typename T>
LEMO_MULTIVERSION void normalise_row_backward(const T* dy, const T* x, const float* weight,
                                              const float* mean, float rstd, int64_t hidden,
                                              float* normal, float* wide_dy, T* dx) {
    const float center = mean != nullptr ? *mean : 0.0f;
    float sum_g = 0, sum_gn = 0;  // over g = dy * weight and over g * normal
#pragma omp simd reduction(+ : sum_g, sum_gn)
    for (int64_t i = 0; i < hidden; ++i) {
        wide_dy[i] = cpu::load(dy[i]);
        normal[i] = (cpu::load(x[i]) - center) * rstd;
        const float g = wide_dy[i] * weight[i];
        sum_g += g;
        sum_gn += g * normal[i];
    }
    const float mean_g = mean != nullptr ? sum_g / static_cast<float>(hidden) : 0.0f;
    const float mean_gn = sum_gn / static_cast<float>(hidden);
#pragma omp simd
    for (int64_t i = 0; i < hidden; ++i) {
        const float g = wide_dy[i] * weight[i];
        cpu::store(dx + i, cpu::load(dx[i]) + rstd * (g - mean_g - normal[i] * mean_gn));
    }
}

LEMO_MULTIVERSION void add_product(const float* a, const float* b, int64_t n, float* sum) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += a[i] * b[i];
}

LEMO_MULTIVERSION void add(const float* a, int64_t n, float* sum) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += a[i];
}

/// Partial sums of one gradient vector, one for each range of rows; nothing where it is not wanted.
class PartialSums {
public:
    PartialSums(const Tensor& total, int64_t num_ranges, int64_t hidden)
        : total_(total), hidden_(hidden), parts_(total ? num_ranges * hidden : 0) {}

    float* part(int64_t range) { return total_ ? parts_.data() + range * hidden_ : nullptr; }

    void reduce() {
        if (!total_) return;
        float* total = total_.as<float>();
        std::fill_n(total, hidden_, 0.0f);
        for (size_t at = 0; at < parts_.size(); at += static_cast<size_t>(hidden_)) {
            add(parts_.data() + at, hidden_, total);
        }
    }

private:
    const Tensor& total_;
    int64_t hidden_;
    std::vector<float> parts_;
};

}  // namespace

void check(const SelectNormParams& params) {
    const Checker check("select_norm");
    check_kind(check, params.kind);
    // As the kernels take it: what fp32 cannot hold is not finite.
    check.that(std::isfinite(static_cast<float>(params.eps)) && params.eps >= 0, "eps",
               "a finite number of at least 0", params.eps);
    const int64_t num_rows = check_rows(check, "x", params.x, params.rows, params.weight);
    if (params.bias) {
        check.that(params.kind == kLayer, "bias", "None for kind 'rms'", params.bias);
        check.floating("bias", params.bias, 1);
        check.dim("bias", params.bias, 0, params.x.size(1), "the hidden size of 'x'");
        check.same_device({{"x", &params.x}, {"bias", &params.bias}});
    }
    check_packed(check, "y", params.y, "x", params.x, num_rows);
    if (params.x_rows) check_packed(check, "x_rows", params.x_rows, "x", params.x, num_rows);
    check_statistics(check, params.kind, params.mean, params.rstd, num_rows);
}

void check(const SelectNormBackwardParams& params) {
    const Checker check("select_norm_backward");
    check_kind(check, params.kind);
    const int64_t num_rows = check_rows(check, "dx", params.dx, params.rows, params.weight);
    check_packed(check, "dy", params.dy, "dx", params.dx, num_rows);
    check_packed(check, "x_rows", params.x_rows, "dx", params.dx, num_rows);
    check_statistics(check, params.kind, params.mean, params.rstd, num_rows);
    check.same_device({{"dx", &params.dx}, {"mean", &params.mean}, {"rstd", &params.rstd}});
    for (const auto& [argument, gradient] :
         {std::pair{"dweight", &params.dweight}, {"dbias", &params.dbias}}) {
        if (!gradient->given()) continue;
        check.typed(argument, *gradient, DType::kFloat32, 1);
        check.dim(argument, *gradient, 0, params.dx.size(1), "the hidden size of 'dx'");
    }
    check.separate("dx", params.dx,
                   {{"dy", &params.dy},
                    {"x_rows", &params.x_rows},
                    {"rows", &params.rows},
                    {"weight", &params.weight},
                    {"mean", &params.mean},
                    {"rstd", &params.rstd}});
}

void select_norm_cpu(const SelectNormParams& params) {
    const int32_t* row = params.rows ? params.rows.as<const int32_t>() : nullptr;
    const int64_t hidden = params.x.size(1), num_rows = params.y.size(0);
    const cpu::Float32Array weight(params.weight), bias(params.bias);
    const float eps = static_cast<float>(params.eps);
    float* mean = params.kind == kLayer ? params.mean.as<float>() : nullptr;
    float* rstd = params.rstd.as<float>();

    cpu::dispatch_float(params.x.dtype, [&]<typename T>(T) {
        const T* x = params.x.as<const T>();
        T* y = params.y.as<T>();
        T* x_rows = params.x_rows ? params.x_rows.as<T>() : nullptr;
        cpu::parallel_ranges(num_rows, kRowsPerThread, [&](int64_t first, int64_t end) {
            std::vector<float> wide(static_cast<size_t>(hidden));
            for (int64_t r = first; r < end; ++r) {
                const T* from = x + (row ? row[r] : r) * hidden;
                normalise_row(from, weight.data(), bias.data(), eps, hidden, wide.data(),
                              y + r * hidden, mean ? mean + r : nullptr, rstd + r);
                if (x_rows != nullptr) std::copy_n(from, hidden, x_rows + r * hidden);
            }
        });
    });
}

void select_norm_backward_cpu(const SelectNormBackwardParams& params) {
    const int32_t* row = params.rows ? params.rows.as<const int32_t>() : nullptr;
    const int64_t hidden = params.dx.size(1), num_rows = params.dy.size(0);
    const cpu::Float32Array weight(params.weight);
    const float* mean = params.kind == kLayer ? params.mean.as<const float>() : nullptr;
    const float* rstd = params.rstd.as<const float>();

    const int64_t range_rows = std::max(kMinRangeRows, ceil_div(num_rows, kMaxRanges));
    const int64_t num_ranges = ceil_div(num_rows, range_rows);
    PartialSums dweight(params.dweight, num_ranges, hidden);
    PartialSums dbias(params.dbias, num_ranges, hidden);
    cpu::dispatch_float(params.dx.dtype, [&]<typename T>(T) {
        const T* dy = params.dy.as<const T>();
        const T* x_rows = params.x_rows.as<const T>();
        T* dx = params.dx.as<T>();
        cpu::parallel_for(num_ranges, [&](int64_t range, int) {
            std::vector<float> normal(static_cast<size_t>(hidden)), wide_dy(normal);
            float* dweight_part = dweight.part(range);
            float* dbias_part = dbias.part(range);
            const int64_t end = std::min(num_rows, (range + 1) * range_rows);
            for (int64_t r = range * range_rows; r < end; ++r) {
                normalise_row_backward(dy + r * hidden, x_rows + r * hidden, weight.data(),
                                       mean ? mean + r : nullptr, rstd[r], hidden, normal.data(),
                                       wide_dy.data(), dx + (row ? row[r] : r) * hidden);
                if (dweight_part) add_product(wide_dy.data(), normal.data(), hidden, dweight_part);
                if (dbias_part) add(wide_dy.data(), hidden, dbias_part);
            }
        });
    });
    dweight.reduce();
    dbias.reduce();
}

}  // namespace lemo
