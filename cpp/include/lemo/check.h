// Errors and argument checks. A failed check names op, argument, what was expected and what came.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "lemo/tensor.h"

namespace lemo {

/// What went wrong. Of these Python raises ValueError, TypeError, NotImplementedError, MemoryError
/// (the host had no memory left) and torch.OutOfMemoryError (a GPU had none).
enum class ErrorKind { kValue, kType, kUnsupported, kMemory, kDeviceMemory };

/// what() is "[lemo:<kind>] <message>"; the prefix survives the trip through torch's dispatcher.
class Error : public std::runtime_error {
public:
    Error(ErrorKind kind, const std::string& message);
    ErrorKind kind() const { return kind_; }

private:
    ErrorKind kind_;
};

/// The text between single quotes.
std::string quoted(std::string_view text);

/// Checks on behalf of one op.
///
///     Checker check("residual_scatter");
///     check.floating("x", params.x, 2);
///     check.that(window >= 0, "window", "at least 0", window);
///
/// Operators are checked at every call, and some checks at every row of a tensor, so the text of a
/// message is made only where a check fails.
class Checker {
public:
    explicit Checker(const char* op) : op_(op) {}

    /// Throws `kind` unless `ok`. What was expected and what came: a text, a number, a tensor, or a
    /// function that returns a text.
    template <typename Expected, typename Got>
    void that(bool ok, const char* argument, const Expected& expected, const Got& got,
              ErrorKind kind = ErrorKind::kValue) const {
        if (!ok) fail(argument, to_text(expected), to_text(got), kind);
    }

    /// Throws `kind`.
    [[noreturn]] void fail(const char* argument, const std::string& expected,
                           const std::string& got, ErrorKind kind = ErrorKind::kValue) const;

    /// A contiguous float32/bfloat16/float16 tensor of `ndim` dimensions on the CPU or a GPU.
    void floating(const char* argument, const Tensor& tensor, int ndim) const;

    /// A contiguous tensor of exactly this dtype and number of dimensions.
    void typed(const char* argument, const Tensor& tensor, DType dtype, int ndim) const;

    /// Dimension `dim` is `expected`, described by `meaning` ("the hidden size of 'x'",
    /// or a function that returns such a text).
    template <typename Meaning>
    void dim(const char* argument, const Tensor& tensor, int dim, int64_t expected,
             const Meaning& meaning) const {
        if (tensor.size(dim) != expected) {
            fail_dim(argument, tensor, dim, expected, to_text(meaning));
        }
    }

    void same_dtype(const char* argument, const Tensor& tensor, const char* other_argument,
                    const Tensor& other) const;

    /// The heads of 'q' [rows, Hq, D] and 'k' [rows, Hk, D] fit: D and Hk are at least 1, and Hq is
    /// a multiple of Hk.
    void heads(const Tensor& q, const Tensor& k) const;

    /// The argument 'scale' is finite and above 0 in fp32, as kernels take it.
    void scale(double value) const;

    /// The argument 'block_size' is from 1 to 2^31 - 1, so that the end of no block overflows.
    void block_size(int64_t value) const;

    /// All given tensors lie on the device of the first one.
    void same_device(std::initializer_list<std::pair<const char*, const Tensor*>> arguments) const;

    /// `written`, which the op changes in place, shares no memory with the others; of contiguous
    /// tensors.
    void separate(const char* argument, const Tensor& written,
                  std::initializer_list<std::pair<const char*, const Tensor*>> others) const;

    /// Row indices are within [0, num_rows) and strictly ascending. Reads CPU tensors' data.
    void ascending_rows(const char* argument, const Tensor& rows, int64_t num_rows) const;

    /// `cuts` [>= 1] int32 go from 0 to `end`, ascending; strictly where no piece may be empty.
    /// Reads CPU tensors' data; of others checks what sizes tell. `end` is -1 where only the device
    /// knows it.
    void cuts(const char* argument, const Tensor& cuts, int64_t end, bool strict) const;

    /// `block_starts` [B+1] and `cu_blocks` [N+1] describe `num_tokens` rows. Reads CPU tensors.
    void layout(const Tensor& block_starts, const Tensor& cu_blocks, int64_t num_tokens) const;

    const char* op() const { return op_; }

private:
    template <typename Value>
    static std::string to_text(const Value& value) {
        if constexpr (std::is_invocable_v<Value>) {
            return value();
        } else if constexpr (std::is_same_v<Value, Tensor>) {
            return describe(value);
        } else if constexpr (std::is_arithmetic_v<Value>) {
            return std::to_string(value);
        } else {
            return std::string(value);
        }
    }

    [[noreturn]] void fail_dim(const char* argument, const Tensor& tensor, int dim,
                               int64_t expected, const std::string& meaning) const;
    void contiguous(const char* argument, const Tensor& tensor, int ndim) const;
    const char* op_;
};

}  // namespace lemo
