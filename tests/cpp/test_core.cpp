// Block arithmetic, storage conversion and products: what every kernel stands on.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "convert.h"
#include "gemm.h"
#include "lemo/blocks.h"
#include "lemo/check.h"
#include "lemo/grid.h"
#include "parallel.h"
#include "views.h"

namespace lemo {
namespace {

TEST(Blocks, RaggedEmptyAndExactSequences) {
    const BlockPlan plan = plan_blocks({5, 0, 4}, 2);
    EXPECT_EQ(plan.block_starts, (std::vector<int32_t>{0, 2, 4, 5, 7, 9}));
    EXPECT_EQ(plan.cu_blocks, (std::vector<int32_t>{0, 3, 3, 5}));
    EXPECT_THROW(plan_blocks({1}, 0), Error);
    EXPECT_THROW(plan_blocks({-1}, 2), Error);
    EXPECT_THROW(plan_blocks({int64_t{1} << 31}, int64_t{1} << 31), Error);
    // Rows are numbered in int32.
    EXPECT_EQ(plan_blocks({1, (int64_t{1} << 31) - 2}, (int64_t{1} << 31) - 1).block_starts.size(),
              3u);
    EXPECT_THROW(plan_blocks({1, (int64_t{1} << 31) - 1}, (int64_t{1} << 31) - 1), Error);
    // Beyond int32 the end of a block would overflow.
    constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
    EXPECT_THROW(plan_blocks({5}, kLargest - 2), Error);
    EXPECT_THROW(plan_selection({5}, kLargest - 2, 0.5, 0, 0), Error);
}

TEST(Blocks, ShiftedGroupsStartHalfAGroupEarly) {
    EXPECT_EQ(group_shift(0, 4, 8), 0);
    EXPECT_EQ(group_shift(2, 4, 8), 4);
    EXPECT_EQ(group_first(3, 8, 4), 0);  // the first shifted group is half as long
    EXPECT_EQ(group_first(4, 8, 4), 4);
    EXPECT_EQ(group_first(11, 8, 4), 4);
    EXPECT_EQ(group_first(11, 8, 0), 8);
}

TEST(Blocks, SelectionSizesFollowFromTheLengths) {
    const auto size = [](const std::vector<int64_t>& seqlens, double value, int64_t keep_first,
                         int64_t keep_last) {
        const SelectionSize size = plan_selection(seqlens, 4, value, keep_first, keep_last);
        return std::pair{size.blocks, size.rows};
    };
    using Size = std::pair<int64_t, int64_t>;
    EXPECT_EQ(size({16, 8}, 0.5, 0, 0), Size(3, 12));                // no ragged block
    EXPECT_EQ(size({18, 0, 3}, 0.5, 1, 1), Size(4, 2 * 4 + 2 + 3));  // ragged blocks are forced
    EXPECT_EQ(size({18}, 0.5, 1, 0), Size(3, -1));
    EXPECT_EQ(size({18}, 0.0, 2, 0), Size(2, 8));   // the ragged block is never taken
    EXPECT_EQ(size({18}, 1.0, 0, 0), Size(5, 18));  // and here it always is
    EXPECT_EQ(size({18}, 0.1, 9, 0), Size(5, 18));
    EXPECT_EQ(size({16, 18}, 0.5, 1, 0), Size(5, -1));
    EXPECT_EQ(size({}, 0.5, 1, 1), Size(0, 0));
    EXPECT_EQ(plan_selection({100}, 1, 0.07, 0, 0).blocks, 7);
    EXPECT_THROW(size({4}, 1.5, 0, 0), Error);
    EXPECT_THROW(size({4}, 0.5, -1, 0), Error);
    EXPECT_THROW(size({-4}, 0.5, 0, 0), Error);
}

TEST(Blocks, LossChunkFitsItsBudget) {
    EXPECT_EQ(plan_loss_chunk(1000, 256, 1024 * 10), 10);
    EXPECT_EQ(plan_loss_chunk(4, 256, 1 << 30), 4);
    EXPECT_EQ(plan_loss_chunk(1000, 1 << 20, 1), 1);
    EXPECT_EQ(plan_loss_chunk(1000, (int64_t{1} << 62) + 1, 1 << 30), 1);
}

TEST(Check, HeadsOfQueriesAndKeysFit) {
    const Checker check("op");
    const auto fit = [&](int64_t query_heads, int64_t query_size, int64_t key_heads,
                         int64_t key_size) {
        std::vector<float> data(1);
        check.heads(testing::view(data, {3, query_heads, query_size}),
                    testing::view(data, {3, key_heads, key_size}));
    };
    EXPECT_NO_THROW(fit(4, 8, 2, 8));
    EXPECT_THROW(fit(4, 8, 3, 8), Error);  // no multiple
    EXPECT_THROW(fit(0, 8, 2, 8), Error);
    EXPECT_THROW(fit(4, 8, 0, 8), Error);
    EXPECT_THROW(fit(4, 8, 2, 4), Error);  // another size
    EXPECT_THROW(fit(4, 0, 2, 0), Error);
}

TEST(Check, ScalesAreFiniteAndAboveZeroInFp32) {
    const Checker check("op");
    EXPECT_NO_THROW(check.scale(0.125));
    for (const double value : {0.0, -1.0, 1e-60, 1e60, std::numeric_limits<double>::infinity(),
                               std::numeric_limits<double>::quiet_NaN()}) {
        EXPECT_THROW(check.scale(value), Error) << value;
    }
}

/// What a failed check says, without its kind; empty where it passes.
template <typename Check>
std::string message_of(Check&& check) {
    try {
        check();
    } catch (const Error& error) {
        const std::string text = error.what();
        return text.substr(text.find("] ") + 2);
    }
    return "";
}

/// A view whose data nobody reads.
Tensor on_gpu(int index, DType dtype, const std::vector<int64_t>& shape) {
    static float data[1];
    Tensor tensor = testing::contiguous_view(data, dtype, Device::kCuda, shape);
    tensor.device_index = index;
    return tensor;
}

TEST(Check, TensorsOfOneCallLieOnOneGpu) {
    const Checker check("op");
    std::vector<float> data(2);
    const Tensor first = on_gpu(0, DType::kFloat32, {2}), second = on_gpu(1, DType::kFloat32, {2});
    const Tensor on_cpu = testing::view(data, {2});
    const auto message = [&](const Tensor& x, const Tensor& y) {
        return message_of([&] { check.same_device({{"x", &x}, {"y", &y}}); });
    };
    EXPECT_EQ(message(first, first), "");
    EXPECT_EQ(message(second, second), "");
    EXPECT_EQ(message(first, Tensor{}), "");
    EXPECT_EQ(message(first, second),
              "op: argument 'y': expected the device of 'x' (cuda:0), got cuda:1");
    EXPECT_EQ(message(second, on_cpu),
              "op: argument 'y': expected the device of 'x' (cuda:1), got cpu");
    EXPECT_EQ(message(on_cpu, second),
              "op: argument 'y': expected the device of 'x' (cpu), got cuda:1");
}

TEST(Check, SizesOfCutsOnAGpu) {
    const Checker check("op");
    const auto message = [&](int64_t entries, int64_t end) {
        const Tensor cuts = on_gpu(0, DType::kInt32, {entries});
        return message_of([&] { check.cuts("cu_q", cuts, end, /*strict=*/false); });
    };
    EXPECT_EQ(message(2, 5), "");
    EXPECT_EQ(message(1, 0), "");
    EXPECT_EQ(message(1, -1), "");  // only the device knows the end
    EXPECT_EQ(message(2, (int64_t{1} << 31) - 1), "");
    EXPECT_EQ(message(0, 0), "op: argument 'cu_q': expected at least one entry, got none");
    EXPECT_EQ(message(1, 5),
              "op: argument 'cu_q': expected a last entry of 5, got the first entry only");
    EXPECT_EQ(message(2, int64_t{1} << 31),
              "op: argument 'cu_q': expected a last entry of at most 2147483647, got 2147483648");
}

TEST(Grid, HoldsWhatCudaAllowsAndNamesTheArgument) {
    // 4194304 rows in tiles of 64, with 32 heads, are too many for any dimension but the first.
    EXPECT_EQ(grid_x("op", "q", int64_t{65536} * 32), 2097152u);
    EXPECT_EQ(grid_x("op", "q", 0), 0u);
    EXPECT_EQ(grid_x("op", "q", 2147483647), 2147483647u);
    EXPECT_EQ(grid_yz("op", "q", 65535), 65535u);
    EXPECT_EQ(message_of([] { grid_x("op", "q", int64_t{1} << 31); }),
              "op: argument 'q': expected a size that needs at most 2147483647 thread blocks of a "
              "CUDA kernel, got one that needs 2147483648");
    // As unsigned they would be 1.
    EXPECT_NE(message_of([] { grid_x("op", "q", (int64_t{1} << 32) + 1); }), "");
    EXPECT_NE(message_of([] { grid_yz("op", "k_up", 65536); }), "");
    try {
        grid_yz("op", "k_up", 65536);
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kUnsupported);
    }
}

TEST(Convert, BFloat16RoundsToNearestEvenAndKeepsNaN) {
    cpu::BFloat16 value;
    for (const auto& [from, to] : {std::pair{1.0f, 1.0f},
                                   {1.00390625f, 1.0f},
                                   {1.01171875f, 1.015625f},
                                   {-3.0e38f, -3.0040553e38f}}) {
        cpu::store(&value, from);
        EXPECT_FLOAT_EQ(cpu::load(value), to);
    }
    cpu::store(&value, std::numeric_limits<float>::quiet_NaN());
    EXPECT_TRUE(std::isnan(cpu::load(value)));
}

TEST(Convert, Float16EveryBitPatternSurvives) {
    for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
        const cpu::Float16 value{static_cast<uint16_t>(bits)};
        const float wide = cpu::load(value);
        cpu::Float16 back;
        cpu::store(&back, wide);
        if (std::isnan(wide)) {
            EXPECT_TRUE(std::isnan(cpu::load(back)));
        } else {
            ASSERT_EQ(back.bits, value.bits) << bits;
        }
    }
    cpu::Float16 value;
    cpu::store(&value, 65519.9f);
    EXPECT_EQ(cpu::load(value), 65504.0f);
    cpu::store(&value, 65520.0f);
    EXPECT_TRUE(std::isinf(cpu::load(value)));
    cpu::store(&value, 0x1p-25f);  // half the smallest subnormal: ties to even, 0
    EXPECT_EQ(cpu::load(value), 0.0f);
}

TEST(Gemm, TransposesStridesAndAccumulates) {
    const float a[] = {1, 2, 3, 4, 5, 6};  // [2, 3]
    const float b[] = {1, 0, 2, 1, 3, 1};  // [3, 2]
    float c[] = {100, 100, -1, 100, 100, -1};
    cpu::gemm(cpu::Trans::kNo, cpu::Trans::kNo, 2, 2, 3, 1.0f, a, 3, b, 2, 1.0f, c, 3);
    EXPECT_EQ(c[0], 114);
    EXPECT_EQ(c[1], 105);
    EXPECT_EQ(c[3], 132);
    EXPECT_EQ(c[4], 111);
    EXPECT_EQ(c[2], -1);
    float d[] = {0};
    cpu::gemm(cpu::Trans::kYes, cpu::Trans::kNo, 1, 1, 2, 1.0f, a, 3, b, 2, 0.0f, d, 1);
    EXPECT_EQ(d[0], 1 * 1 + 4 * 2);
}

TEST(Error, NamesItsKind) {
    EXPECT_STREQ(Error(ErrorKind::kUnsupported, "x").what(), "[lemo:unsupported] x");
    EXPECT_STREQ(Error(ErrorKind::kMemory, "x").what(), "[lemo:memory] x");
    EXPECT_STREQ(Error(ErrorKind::kDeviceMemory, "x").what(), "[lemo:device_memory] x");
}

TEST(Parallel, CoversEveryItemOnceAndRethrows) {
    std::vector<int> hits(1000);
    cpu::parallel_ranges(1000, 10, [&](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; ++i) ++hits[static_cast<size_t>(i)];
    });
    EXPECT_EQ(hits, std::vector<int>(1000, 1));
    const auto fail_at_two = [](int64_t i, int) {
        if (i == 2) throw Error(ErrorKind::kValue, "x");
    };
    EXPECT_THROW(cpu::parallel_for(4, fail_at_two), Error);
}

}  // namespace
}  // namespace lemo
