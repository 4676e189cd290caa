// Storage types of the CPU kernels. bf16 and fp16 are loaded to fp32 and rounded once at the store.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lemo/check.h"
#include "lemo/tensor.h"

namespace lemo::cpu {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(BFloat16 value) {
    return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

inline float load(Float16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity and NaN
        return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    }
    // Moving the bits into fp32's fields leaves the exponent 112 short; the product mends it, and
    // turns fp16 subnormals into normal numbers on the way.
    const float shifted = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(shifted));
}

inline void store(float* to, float value) { *to = value; }

inline void store(BFloat16* to, float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN stays NaN: rounding could carry it to infinity
        to->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
        return;
    }
    to->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void store(Float16* to, float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        to->bits = static_cast<uint16_t>(sign | 0x7e00u);
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        to->bits = static_cast<uint16_t>(sign | 0x7c00u);
    } else if (magnitude < 0x38800000u) {
        // Below the smallest normal fp16: adding 0.5 puts the fp16 subnormal's last bit at fp32's,
        // so the hardware rounds to nearest even for us.
        const float sum = std::bit_cast<float>(magnitude) + 0.5f;
        to->bits = static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000u));
    } else {
        magnitude += 0xfffu + ((magnitude >> 13) & 1u);
        to->bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
    }
}

template <typename T>
void load_row(float* to, const T* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <typename T>
void store_row(T* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
}

/// to [rows, width] = factor * from, whose rows lie `stride` elements apart.
template <typename T>
void load_rows(float* to, const T* from, int64_t rows, int64_t stride, int64_t width,
               float factor = 1.0f) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) to[r * width + i] = factor * load(from[r * stride + i]);
    }
}

/// Rows `stride` elements apart in `to` = factor * from [rows, width].
template <typename T>
void store_rows(T* to, const float* from, int64_t rows, int64_t stride, int64_t width,
                float factor = 1.0f) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) {
            store(to + r * stride + i, factor * from[r * width + i]);
        }
    }
}

/// Calls `body(T{})` with the storage type of `dtype`.
template <typename Body>
void dispatch_float(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::kFloat32: return body(float{});
        case DType::kBFloat16: return body(BFloat16{});
        case DType::kFloat16: return body(Float16{});
        default: throw Error(ErrorKind::kType, std::string("no CPU kernel for ") + name(dtype));
    }
}

/// `n` values in fp32: where they lie if they already are, else converted into `scratch`.
template <typename T>
const float* as_float(const T* from, int64_t n, std::vector<float>& scratch) {
    if constexpr (std::is_same_v<T, float>) {
        return from;
    } else {
        scratch.resize(static_cast<size_t>(n));
        load_row(scratch.data(), from, n);
        return scratch.data();
    }
}

/// The elements of a contiguous float tensor in fp32: borrowed where they already are, converted
/// otherwise. data() of an absent tensor is null.
class Float32Array {
public:
    explicit Float32Array(const Tensor& tensor) {
        if (!tensor) return;
        dispatch_float(tensor.dtype, [&]<typename T>(T) {
            data_ = as_float(tensor.as<const T>(), tensor.num_elements(), converted_);
        });
    }
    Float32Array(const Float32Array&) = delete;
    Float32Array& operator=(const Float32Array&) = delete;

    const float* data() const { return data_; }

private:
    std::vector<float> converted_;
    const float* data_ = nullptr;
};

}  // namespace lemo::cpu
