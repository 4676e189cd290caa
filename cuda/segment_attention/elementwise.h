// What the kernels of both tiers share: the shape of a tile, and rounding of registers between two
// mmas.
#pragma once

#include <cute/tensor.hpp>

#include <cutlass/numeric_conversion.h>

namespace lemo::cuda::segment_attention {

template <int kRows, int kColumns>
using TileShape = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>;

/// fp32 registers rounded to the storage type, two at a time.
template <typename Element, typename Tensor>
__device__ __forceinline__ auto round_to(const Tensor& tensor) {
    constexpr int kCount = decltype(cute::size(tensor.layout()))::value;
    cutlass::NumericArrayConverter<Element, float, kCount> convert;
    auto rounded = cute::make_tensor<Element>(tensor.layout());
    *reinterpret_cast<cutlass::Array<Element, kCount>*>(rounded.data()) =
        convert(*reinterpret_cast<const cutlass::Array<float, kCount>*>(tensor.data()));
    return rounded;
}

/// Two floats rounded to the storage type; `first` in the low half.
template <typename Element>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
    cutlass::NumericArrayConverter<Element, float, 2> convert;
    cutlass::Array<float, 2> pair;
    pair[0] = first;
    pair[1] = second;
    const cutlass::Array<Element, 2> rounded = convert(pair);
    return reinterpret_cast<const uint32_t&>(rounded);
}

}  // namespace lemo::cuda::segment_attention
