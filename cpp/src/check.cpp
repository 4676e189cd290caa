#include "lemo/check.h"

#include <cmath>
#include <limits>
#include <utility>

namespace lemo {
namespace {

const char* prefix(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::kValue: return "[lemo:value] ";
        case ErrorKind::kType: return "[lemo:type] ";
        case ErrorKind::kUnsupported: return "[lemo:unsupported] ";
        case ErrorKind::kMemory: return "[lemo:memory] ";
        case ErrorKind::kDeviceMemory: return "[lemo:device_memory] ";
    }
    return "";
}

/// "cpu", or "cuda:1".
std::string device_of(const Tensor& tensor) {
    const std::string kind = name(tensor.device);
    return tensor.device == Device::kCuda ? kind + ":" + std::to_string(tensor.device_index) : kind;
}

}  // namespace

Error::Error(ErrorKind kind, const std::string& message)
    : std::runtime_error(prefix(kind) + message), kind_(kind) {}

std::string quoted(std::string_view text) { return std::string("'").append(text).append("'"); }

std::string describe(const Tensor& tensor) {
    if (!tensor) return "nothing";
    std::string text = std::string(name(tensor.dtype)) + " [";
    for (int i = 0; i < tensor.ndim; ++i) {
        if (i > 0) text += ", ";
        text += std::to_string(tensor.size(i));
    }
    return text + "] on " + name(tensor.device);
}

void Checker::fail(const char* argument, const std::string& expected, const std::string& got,
                   ErrorKind kind) const {
    throw Error(kind, std::string(op_) + ": argument '" + argument + "': expected " + expected +
                          ", got " + got);
}

void Checker::separate(const char* argument, const Tensor& written,
                       std::initializer_list<std::pair<const char*, const Tensor*>> others) const {
    const auto first = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data); };
    const auto end = [&](const Tensor& t) {
        return first(t) + static_cast<uintptr_t>(t.num_elements() * size_of(t.dtype));
    };
    for (const auto& [other, tensor] : others) {
        if (!tensor->given() || tensor->is_empty() || written.is_empty()) continue;
        if (first(written) >= end(*tensor) || first(*tensor) >= end(written)) continue;
        fail(argument, "memory of its own, as it is changed in place",
             std::string("memory that '") + other + "' shares");
    }
}

void Checker::contiguous(const char* argument, const Tensor& tensor, int ndim) const {
    if (tensor.ndim != ndim) {
        fail(argument, std::to_string(ndim) + " dimension(s)", describe(tensor));
    }
    that(tensor.device != Device::kOther, argument, "a tensor on cpu or cuda", tensor,
         ErrorKind::kUnsupported);
    that(tensor.is_contiguous(), argument, "a contiguous tensor", "strides of another layout");
    if (tensor.data == nullptr && !tensor.is_empty()) {
        fail(argument, "a tensor with memory", describe(tensor) + " whose storage is gone");
    }
}

void Checker::floating(const char* argument, const Tensor& tensor, int ndim) const {
    that(is_float(tensor.dtype), argument, "float32, bfloat16 or float16", tensor,
         ErrorKind::kType);
    contiguous(argument, tensor, ndim);
}

void Checker::typed(const char* argument, const Tensor& tensor, DType dtype, int ndim) const {
    that(tensor.dtype == dtype, argument, name(dtype), tensor, ErrorKind::kType);
    contiguous(argument, tensor, ndim);
}

void Checker::fail_dim(const char* argument, const Tensor& tensor, int dim, int64_t expected,
                       const std::string& meaning) const {
    fail(argument,
         "size " + std::to_string(expected) + " in dimension " + std::to_string(dim) + " (" +
             meaning + ")",
         describe(tensor));
}

void Checker::same_dtype(const char* argument, const Tensor& tensor, const char* other_argument,
                         const Tensor& other) const {
    if (tensor.dtype == other.dtype) return;
    fail(argument, std::string("the dtype of '") + other_argument + "' (" + name(other.dtype) + ")",
         name(tensor.dtype), ErrorKind::kType);
}

void Checker::heads(const Tensor& q, const Tensor& k) const {
    that(q.size(2) >= 1, "q", "a head size of at least 1", q);
    dim("k", k, 2, q.size(2), "the head size of 'q'");
    that(k.size(1) >= 1, "k", "at least one head", k);
    if (q.size(1) < 1 || q.size(1) % k.size(1) != 0) {
        fail("q", "a multiple of the " + std::to_string(k.size(1)) + " head(s) of 'k'",
             std::to_string(q.size(1)) + " head(s)");
    }
}

void Checker::scale(double value) const {
    const auto narrow = static_cast<float>(value);
    that(std::isfinite(narrow) && narrow > 0, "scale", "a finite number above 0", value);
}

void Checker::block_size(int64_t value) const {
    that(value >= 1 && value <= std::numeric_limits<int32_t>::max(), "block_size",
         "from 1 to 2147483647", value);
}

void Checker::same_device(
    std::initializer_list<std::pair<const char*, const Tensor*>> arguments) const {
    const auto& [first_name, first] = *arguments.begin();
    for (const auto& [argument, tensor] : arguments) {
        if (!tensor->given() ||
            (tensor->device == first->device && tensor->device_index == first->device_index)) {
            continue;
        }
        fail(argument,
             std::string("the device of '") + first_name + "' (" + device_of(*first) + ")",
             device_of(*tensor));
    }
}

void Checker::ascending_rows(const char* argument, const Tensor& rows, int64_t num_rows) const {
    if (rows.device != Device::kCpu) return;
    const int32_t* row = rows.as<const int32_t>();
    int64_t previous = -1;
    for (int64_t i = 0; i < rows.size(0); ++i) {
        if (row[i] <= previous || row[i] >= num_rows) {
            fail(argument, "strictly ascending rows below " + std::to_string(num_rows),
                 std::to_string(row[i]) + " after " + std::to_string(previous) + " at index " +
                     std::to_string(i));
        }
        previous = row[i];
    }
}

void Checker::cuts(const char* argument, const Tensor& cuts, int64_t end, bool strict) const {
    typed(argument, cuts, DType::kInt32, 1);
    that(cuts.size(0) >= 1, argument, "at least one entry", "none");
    that(end <= std::numeric_limits<int32_t>::max(), argument, "a last entry of at most 2147483647",
         end);
    const auto ends_there = [end] { return "a last entry of " + std::to_string(end); };
    if (cuts.device != Device::kCpu) {
        // Without a piece kernels have nowhere to look for the first row.
        that(cuts.size(0) > 1 || end <= 0, argument, ends_there, "the first entry only");
        return;
    }
    const int32_t* cut = cuts.as<const int32_t>();
    const int64_t n = cuts.size(0);
    that(cut[0] == 0, argument, "a first entry of 0", cut[0]);
    for (int64_t i = 1; i < n; ++i) {
        if (cut[i] > cut[i - 1] || (!strict && cut[i] == cut[i - 1])) continue;
        fail(argument, strict ? "ascending entries" : "entries that do not descend",
             std::to_string(cut[i]) + " after " + std::to_string(cut[i - 1]));
    }
    that(cut[n - 1] == end, argument, ends_there, cut[n - 1]);
}

void Checker::layout(const Tensor& block_starts, const Tensor& cu_blocks,
                     int64_t num_tokens) const {
    cuts("block_starts", block_starts, num_tokens, /*strict=*/true);
    cuts("cu_blocks", cu_blocks, block_starts.size(0) - 1, /*strict=*/false);
}

}  // namespace lemo
