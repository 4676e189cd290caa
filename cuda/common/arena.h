// Scratch memory of a call: who needs it, takes it in parts, and says in advance how much that is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/vector.h"

namespace lemo::cuda {

/// Where the parts of a scratch begin. Also the boundary that the caller owes: torch's allocator
/// and cudaMalloc keep it, and cuBLAS asks for it.
inline constexpr int64_t kScratchAlignment = 256;

/// Hands out aligned parts of a scratch, one after the other; without memory it only counts.
class Arena {
public:
    /// `base` is aligned to kScratchAlignment, or null.
    explicit Arena(void* base) : base_(static_cast<std::byte*>(base)) {}

    /// Room for `count` elements; null where this arena only counts.
    template <typename T>
    T* take(int64_t count) {
        const int64_t at = bytes_;
        bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), kScratchAlignment);
        return base_ != nullptr ? reinterpret_cast<T*>(base_ + at) : nullptr;
    }

    /// Bytes taken so far.
    int64_t bytes() const { return bytes_; }

private:
    std::byte* base_;
    int64_t bytes_ = 0;
};

/// Bytes that the constructor `Layout(arguments..., Arena&)` takes: what `x_scratch_bytes` returns.
template <typename Layout, typename... Arguments>
int64_t count_scratch_bytes(const Arguments&... arguments) {
    Arena arena(nullptr);
    const Layout layout(arguments..., arena);
    return arena.bytes();
}

}  // namespace lemo::cuda
