#include "lemo/bf16_split.h"

#include <algorithm>
#include <cmath>

#include "convert.h"
#include "lemo/check.h"
#include "parallel.h"

namespace lemo {
namespace {

// Elements a thread should own before a second one pays.
constexpr int64_t kElementsPerThread = 16384;

}  // namespace

void check(const Bf16SplitParams& params) {
    const Checker check("bf16_split");
    const bool by_blocks = params.x.ndim == 3;
    check.typed("x", params.x, DType::kFloat32, by_blocks ? 3 : 2);
    if (by_blocks) check.dim("x", params.x, 1, 3, "the blocks of a row");
    check.that(std::isfinite(params.scale), "scale", "a finite number", params.scale);
    check.typed("y", params.y, DType::kBFloat16, 3);
    check.same_device({{"x", &params.x}, {"y", &params.y}});
    check.dim("y", params.y, 0, params.x.size(0), "the rows of 'x'");
    check.dim("y", params.y, 1, 3, "the blocks of a row");
    check.dim("y", params.y, 2, params.x.size(by_blocks ? 2 : 1), "the columns of 'x'");
}

void check(const Bf16SplitAllParams& params) {
    const Checker check("bf16_split_all");
    int64_t elements = 0;
    check.typed("y", params.y, DType::kBFloat16, 1);
    for (const Tensor& x : params.xs) {
        check.typed("xs", x, DType::kFloat32, 2);
        check.same_device({{"xs", &x}, {"y", &params.y}});
        elements += x.num_elements();
    }
    check.dim("y", params.y, 0, 3 * elements, "three blocks of all matrices");
}

void bf16_split_cpu(const Bf16SplitParams& params) {
    const bool by_blocks = params.x.ndim == 3;
    const int64_t rows = params.x.size(0), n = params.y.size(2);
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(n, 1));
    cpu::parallel_ranges(rows, grain, [&](int64_t first, int64_t end) {
        for (int64_t r = first; r < end; ++r) {
            const float* x = params.x.as<const float>() + r * (by_blocks ? 3 * n : n);
            cpu::BFloat16* y = params.y.as<cpu::BFloat16>() + r * 3 * n;
            for (int64_t c = 0; c < n; ++c) {
                const float value = params.scale * (by_blocks ? x[c] + x[n + c] : x[c]);
                cpu::BFloat16 high, low;
                cpu::store(&high, value);
                // The rest of an infinity is none.
                const float rest = value - cpu::load(high);
                cpu::store(&low, std::isinf(cpu::load(high)) ? 0.0f : rest);
                y[c] = high;
                y[n + c] = params.left ? high : low;
                y[2 * n + c] = params.left ? low : high;
            }
        }
    });
}

void bf16_split_all_cpu(const Bf16SplitAllParams& params) {
    cpu::BFloat16* y = params.y.as<cpu::BFloat16>();
    for (const Tensor& x : params.xs) {
        Tensor blocks = params.y;
        blocks.data = y;
        blocks.ndim = 3;
        blocks.shape = {x.size(0), 3, x.size(1)};
        blocks.stride = {3 * x.size(1), x.size(1), 1};
        bf16_split_cpu({x, blocks, 1.0f, false});
        y += 3 * x.num_elements();
    }
}

}  // namespace lemo
