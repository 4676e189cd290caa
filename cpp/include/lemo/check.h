// Errors and argument checks. A failed check names op, argument, what was expected and what came.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "lemo/tensor.h"

namespace lemo {

/// What kind of mistake the caller made; Python raises ValueError, TypeError, NotImplementedError.
enum class ErrorKind { kValue, kType, kUnsupported };

/// what() is "[lemo:<kind>] <message>"; the prefix survives the trip through torch's dispatcher.
class Error : public std::runtime_error {
public:
    Error(ErrorKind kind, const std::string& message);
    ErrorKind kind() const { return kind_; }

private:
    ErrorKind kind_;
};

/// Checks on behalf of one op.
///
///     Checker check("residual_scatter");
///     check.floating("x", params.x, 2);
///     check.that(rows <= tokens, "rows", "at most 8 rows", "9 rows");
class Checker {
public:
    explicit Checker(const char* op) : op_(op) {}

    /// Throws `kind` unless `ok`.
    void that(bool ok, const char* argument, const std::string& expected, const std::string& got,
              ErrorKind kind = ErrorKind::kValue) const;

    /// A contiguous float32/bfloat16/float16 tensor of `ndim` dimensions on the CPU or a GPU.
    void floating(const char* argument, const Tensor& tensor, int ndim) const;

    /// A contiguous tensor of exactly this dtype and number of dimensions.
    void typed(const char* argument, const Tensor& tensor, DType dtype, int ndim) const;

    /// Dimension `dim` is `expected`, described by `meaning` ("the hidden size of 'x'").
    void dim(const char* argument, const Tensor& tensor, int dim, int64_t expected,
             const char* meaning) const;

    void same_dtype(const char* argument, const Tensor& tensor, const char* other_argument,
                    const Tensor& other) const;

    /// All given tensors lie on the device of the first one.
    void same_device(std::initializer_list<std::pair<const char*, const Tensor*>> arguments) const;

    /// `written`, which the op changes in place, shares no memory with the others; of contiguous
    /// tensors.
    void separate(const char* argument, const Tensor& written,
                  std::initializer_list<std::pair<const char*, const Tensor*>> others) const;

    /// Row indices are within [0, num_rows) and strictly ascending. Reads CPU tensors' data.
    void ascending_rows(const char* argument, const Tensor& rows, int64_t num_rows) const;

    /// `cuts` [>= 1] int32 go from 0 to `end`, ascending; strictly where no piece may be empty.
    /// Reads CPU tensors' data.
    void cuts(const char* argument, const Tensor& cuts, int64_t end, bool strict) const;

    /// `block_starts` [B+1] and `cu_blocks` [N+1] describe `num_tokens` rows. Reads CPU tensors.
    void layout(const Tensor& block_starts, const Tensor& cu_blocks, int64_t num_tokens) const;

    const char* op() const { return op_; }

private:
    void contiguous(const char* argument, const Tensor& tensor, int ndim) const;
    const char* op_;
};

}  // namespace lemo
