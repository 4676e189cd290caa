#include "lemo/bf16_split.h"

#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <utility>

#include "compare.h"
#include "device_views.h"
#include "lemo/check.h"

namespace lemo {
namespace {

using cpu::BFloat16;
using testing::contiguous_view;
using testing::DeviceArray;
using testing::expect_same_bits;
using testing::random_values;
using testing::view;

/// The same bits as on the CPU; x begins `skipped` numbers behind an address of 16 bytes.
void matches_cpu(std::vector<float> x, int64_t rows, bool by_blocks, float scale, bool left,
                 int64_t skipped = 0) {
    const int64_t n = (static_cast<int64_t>(x.size()) - skipped) / rows / (by_blocks ? 3 : 1);
    const auto shape = by_blocks ? std::vector<int64_t>{rows, 3, n} : std::vector<int64_t>{rows, n};
    std::vector<BFloat16> oracle(static_cast<size_t>(rows * 3 * n));
    std::vector<float> values(x.begin() + skipped, x.end());
    bf16_split_cpu({view(values, shape), view(oracle, {rows, 3, n}), scale, left});

    const DeviceArray<float> device_x(x);
    const DeviceArray<BFloat16> y(oracle.size());
    const Tensor of_x =
        contiguous_view(device_x.data() + skipped, DType::kFloat32, Device::kCuda, shape);
    const Bf16SplitParams params{of_x, y.view({rows, 3, n}), scale, left};
    check(params);
    bf16_split_cuda(params, nullptr);
    expect_same_bits(y.download(), oracle, std::to_string(rows) + " x " + std::to_string(n));
}

TEST(Bf16SplitCuda, SameBitsAsTheCpu) {
    for (const auto& [rows, columns] :
         {std::pair{1, 1}, {3, 8}, {13, 7}, {4096, 16}, {5, 4096}, {1, 4099}, {700, 48}}) {
        for (const bool left : {false, true}) {
            const int64_t n = int64_t{rows} * columns;
            matches_cpu(random_values<float>(n, 1, 3), rows, false, 0.7f, left);
            matches_cpu(random_values<float>(3 * n, 2), rows, true, -1.3f, left);
        }
    }
}

/// The same bits as on the CPU; the first matrix begins `skipped` numbers behind an address of 16
/// bytes.
void all_match_cpu(const std::vector<std::pair<int64_t, int64_t>>& shapes, int64_t skipped = 0) {
    std::vector<std::vector<float>> values;
    std::vector<std::unique_ptr<DeviceArray<float>>> on_device;
    Bf16SplitAllParams host, device;
    values.reserve(shapes.size());
    int64_t elements = 0;
    for (const auto& [rows, columns] : shapes) {
        const int64_t n = rows * columns, before = on_device.empty() ? skipped : 0;
        std::vector<float>& x = values.emplace_back(random_values<float>(n, elements, 3));
        host.xs.push_back(view(x, {rows, columns}));
        std::vector<float> padded(static_cast<size_t>(before));
        padded.insert(padded.end(), x.begin(), x.end());
        on_device.push_back(std::make_unique<DeviceArray<float>>(padded));
        device.xs.push_back(contiguous_view(on_device.back()->data() + before, DType::kFloat32,
                                            Device::kCuda, {rows, columns}));
        elements += n;
    }
    std::vector<BFloat16> oracle(static_cast<size_t>(3 * elements));
    host.y = view(oracle, {3 * elements});
    bf16_split_all_cpu(host);

    const DeviceArray<BFloat16> y(oracle.size());
    device.y = y.view({3 * elements});
    check(device);
    bf16_split_all_cuda(device, nullptr);
    expect_same_bits(y.download(), oracle, std::to_string(shapes.size()) + " matrices");
}

TEST(Bf16SplitCuda, SeveralMatrices) {
    all_match_cpu({{1, 9216}, {576, 16}});
    all_match_cpu({{1, 9216}, {1, 9216}, {1, 9216}, {576, 16}, {192, 16}, {192, 16}});
    all_match_cpu({{5, 7}, {1, 1}, {3, 4}});
    all_match_cpu({{4, 0}, {2, 8}, {0, 8}});
    all_match_cpu({{64, 16}, {3, 8}}, 1);
    all_match_cpu({{4, 0}});
    // More than a launch takes.
    all_match_cpu(std::vector<std::pair<int64_t, int64_t>>(32, {3, 8}));
    all_match_cpu(std::vector<std::pair<int64_t, int64_t>>(37, {2, 5}));
}

TEST(Bf16SplitCuda, ArraysOffA16ByteAddress) {
    matches_cpu(random_values<float>(64 * 16 + 1, 3), 64, false, 2, true, 1);
    matches_cpu(random_values<float>(64 * 48 + 2, 4), 64, true, 2, true, 2);
}

TEST(Bf16SplitCuda, EndsOfTheNumberRange) {
    const float infinity = std::numeric_limits<float>::infinity();
    const float most = std::numeric_limits<float>::max();
    const float least = std::numeric_limits<float>::denorm_min();
    matches_cpu({infinity, -infinity, most, -most, least, 0x1p-126f, 0.0f, -0.0f}, 1, false, 1,
                true);
}

TEST(Bf16SplitCuda, NothingToDo) {
    const DeviceArray<float> x(0);
    const DeviceArray<BFloat16> y(0);
    bf16_split_cuda({x.view({0, 4}), y.view({0, 3, 4}), 1, true}, nullptr);
    bf16_split_cuda({x.view({4, 0}), y.view({4, 3, 0}), 1, true}, nullptr);
}

}  // namespace
}  // namespace lemo
