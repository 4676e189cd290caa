// CuTe building blocks of the portable kernels: tiles in shared memory, their mma (mma.sync), and
// the views under which accumulators are read.
#pragma once

#include <cute/tensor.hpp>

#include <cutlass/numeric_types.h>

#include "segment_attention/elementwise.h"

namespace lemo::cuda::segment_attention::portable {

using cute::_;
using cute::_0;
using cute::_1;
using cute::_16;
using cute::_2;
using cute::_8;
using cute::Layout;
using cute::Shape;
using cute::Stride;

/// The mma of a storage type: 16 x 8 x 16, fp32 accumulators.
template <typename Element>
using MmaAtom = cute::MMA_Atom<
    std::conditional_t<std::is_same_v<Element, cutlass::half_t>, cute::SM80_16x8x16_F32F16F16F32_TN,
                       cute::SM80_16x8x16_F32BF16BF16F32_TN>>;

/// Rows of 64 elements (128 bytes) swizzled in groups of eight: neither ldmatrix nor 16-byte stores
/// of eight consecutive rows meet in a bank.
using SmemAtom = decltype(cute::composition(cute::Swizzle<3, 3, 3>{},
                                            Layout<Shape<_8, cute::_64>, Stride<cute::_64, _1>>{}));

/// The same of tiles of 32 columns: rows of 64 bytes.
using NarrowSmemAtom = decltype(cute::composition(
    cute::Swizzle<2, 3, 3>{}, Layout<Shape<_8, cute::_32>, Stride<cute::_32, _1>>{}));

template <int kRows, int kColumns>
using SmemLayout = decltype(cute::tile_to_shape(
    std::conditional_t<kColumns == 32, NarrowSmemAtom, SmemAtom>{}, TileShape<kRows, kColumns>{}));

/// The same memory read as its transpose, [columns, rows].
template <int kRows, int kColumns>
using SmemLayoutTransposed =
    decltype(cute::composition(SmemLayout<kRows, kColumns>{},
                               Layout<TileShape<kColumns, kRows>, Stride<cute::Int<kRows>, _1>>{}));

/// A tile in shared memory, [rows, columns], read as its transpose.
template <typename SharedTensor>
__device__ __forceinline__ auto transposed(const SharedTensor& tile) {
    constexpr int kRows = decltype(cute::size<0>(tile))::value;
    constexpr int kColumns = decltype(cute::size<1>(tile))::value;
    return cute::make_tensor(tile.data(), SmemLayoutTransposed<kRows, kColumns>{});
}

/// 16-byte copies of [rows, kColumns] tiles by a whole thread block.
template <typename CopyOp, typename Element, int kThreads>
using RowTileCopy = decltype(cute::make_tiled_copy(
    cute::Copy_Atom<CopyOp, Element>{},
    Layout<Shape<cute::Int<kThreads / 8>, _8>, Stride<_8, _1>>{}, Layout<Shape<_1, _8>>{}));

template <typename Element>
using LoadFragment = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, Element>;
template <typename Element>
using LoadFragmentTransposed = cute::Copy_Atom<cute::SM75_U16x8_LDSM_T, Element>;

/// A [rows, head_dim] matrix in global memory whose rows lie `stride` elements apart.
template <typename Element>
struct GlobalRows {
    Element* first;
    int64_t stride;
    int num_rows;  // from `first` on; what lies beyond is read as zero and never written
    int head_dim;
};

template <typename Element, int kRows, int kColumns>
__device__ auto global_tile(const GlobalRows<Element>& rows) {
    return cute::make_tensor(cute::make_gmem_ptr(rows.first), TileShape<kRows, kColumns>{},
                             cute::make_stride(rows.stride, _1{}));
}

/// Starts the asynchronous copy of a tile into shared memory. The caller commits and waits.
template <int kThreads, int kRows, int kColumns, typename Element, typename SharedTensor>
__device__ __forceinline__ void load_tile_async(const GlobalRows<const Element>& rows,
                                                SharedTensor&& shared) {
    using Copy =
        RowTileCopy<cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>, Element, kThreads>;
    Copy tiled_copy;
    const auto thread_copy = tiled_copy.get_thread_slice(threadIdx.x);
    const auto from = thread_copy.partition_S(global_tile<const Element, kRows, kColumns>(rows));
    auto to = thread_copy.partition_D(shared);
    const auto where =
        thread_copy.partition_S(cute::make_identity_tensor(TileShape<kRows, kColumns>{}));
    CUTE_UNROLL
    for (int r = 0; r < cute::size<1>(to); ++r) {
        const bool row_exists = cute::get<0>(where(_0{}, r, _0{})) < rows.num_rows;
        CUTE_UNROLL
        for (int c = 0; c < cute::size<2>(to); ++c) {
            const bool exists = row_exists && cute::get<1>(where(_0{}, _0{}, c)) < rows.head_dim;
            cute::copy(tiled_copy.with(exists), from(_, r, c), to(_, r, c));
        }
    }
}

/// Writes a tile of shared memory to the rows and columns that exist.
template <int kThreads, int kRows, int kColumns, typename Element, typename SharedTensor>
__device__ __forceinline__ void store_tile(const SharedTensor& shared,
                                           const GlobalRows<Element>& rows) {
    using Copy = RowTileCopy<cute::UniversalCopy<cute::uint128_t>, Element, kThreads>;
    Copy tiled_copy;
    const auto thread_copy = tiled_copy.get_thread_slice(threadIdx.x);
    const auto from = thread_copy.partition_S(shared);
    auto to = thread_copy.partition_D(global_tile<Element, kRows, kColumns>(rows));
    const auto where =
        thread_copy.partition_S(cute::make_identity_tensor(TileShape<kRows, kColumns>{}));
    CUTE_UNROLL
    for (int r = 0; r < cute::size<1>(to); ++r) {
        if (cute::get<0>(where(_0{}, r, _0{})) >= rows.num_rows) continue;
        CUTE_UNROLL
        for (int c = 0; c < cute::size<2>(to); ++c) {
            if (cute::get<1>(where(_0{}, _0{}, c)) >= rows.head_dim) continue;
            cute::copy(tiled_copy, from(_, r, c), to(_, r, c));
        }
    }
}

/// One operand of an mma: its tile in shared memory and how ldmatrix brings it to registers.
template <typename TiledCopy, typename SharedPartition, typename Fragment>
struct Operand {
    TiledCopy tiled_copy;
    SharedPartition shared;
    Fragment fragment;

    template <typename Step>
    __device__ __forceinline__ void load(Step step) {
        auto view = tiled_copy.get_thread_slice(threadIdx.x).retile_D(fragment);
        cute::copy(tiled_copy, shared(_, _, step), view(_, _, step));
    }
};

template <typename TiledCopy, typename SharedPartition, typename Fragment>
__device__ __forceinline__ auto make_operand(TiledCopy tiled_copy, SharedPartition shared,
                                             Fragment fragment) {
    return Operand<TiledCopy, SharedPartition, Fragment>{tiled_copy, shared, fragment};
}

/// Left operand [M, K] read from `shared`.
template <typename CopyAtom, typename TiledMma, typename SharedTensor>
__device__ __forceinline__ auto left_operand(CopyAtom atom, TiledMma tiled_mma,
                                             const SharedTensor& shared) {
    const auto tiled_copy = cute::make_tiled_copy_A(atom, tiled_mma);
    const auto unswizzled =
        cute::make_tensor(shared.data(), cute::make_layout(cute::shape(shared)));
    return make_operand(tiled_copy, tiled_copy.get_thread_slice(threadIdx.x).partition_S(shared),
                        tiled_mma.get_thread_slice(threadIdx.x).partition_fragment_A(unswizzled));
}

/// Right operand [N, K] read from `shared`.
template <typename CopyAtom, typename TiledMma, typename SharedTensor>
__device__ __forceinline__ auto right_operand(CopyAtom atom, TiledMma tiled_mma,
                                              const SharedTensor& shared) {
    const auto tiled_copy = cute::make_tiled_copy_B(atom, tiled_mma);
    const auto unswizzled =
        cute::make_tensor(shared.data(), cute::make_layout(cute::shape(shared)));
    return make_operand(tiled_copy, tiled_copy.get_thread_slice(threadIdx.x).partition_S(shared),
                        tiled_mma.get_thread_slice(threadIdx.x).partition_fragment_B(unswizzled));
}

struct Nothing {
    __device__ void operator()(int, int) const {}
};

/// accumulators += left * right^T; the fragments of a step load while the step before it runs.
/// `meanwhile(step, number of steps)` is called in each step, and overlaps with its mma.
template <typename TiledMma, typename Left, typename Right, typename Accumulators,
          typename Meanwhile = Nothing>
__device__ __forceinline__ void tile_mma(TiledMma tiled_mma, Left left, Right right,
                                         Accumulators& accumulators, Meanwhile meanwhile = {}) {
    constexpr int kSteps = decltype(cute::size<2>(right.fragment))::value;
    left.load(0);
    right.load(0);
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) {
            left.load(step + 1);
            right.load(step + 1);
        }
        cute::gemm(tiled_mma, left.fragment(_, _, step), right.fragment(_, _, step), accumulators);
        meanwhile(step, kSteps);
    }
}

/// As `tile_mma`, with a left operand that is in registers already.
template <typename TiledMma, typename Fragment, typename Right, typename Accumulators>
__device__ __forceinline__ void register_mma(TiledMma tiled_mma, const Fragment& left, Right right,
                                             Accumulators& accumulators) {
    constexpr int kSteps = decltype(cute::size<2>(right.fragment))::value;
    right.load(0);
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) right.load(step + 1);
        cute::gemm(tiled_mma, left(_, _, step), right.fragment(_, _, step), accumulators);
    }
}

/// ((2 columns, 2 rows), M, N) of an accumulator, or of its coordinates, as (rows, columns).
template <typename Tensor>
__device__ __forceinline__ auto by_row_and_column(Tensor&& tensor) {
    const auto split = cute::logical_divide(tensor.layout(), Shape<_2>{});
    using cute::get;
    return cute::make_tensor(static_cast<Tensor&&>(tensor).data(),
                             cute::make_layout(cute::make_layout(get<0, 1>(split), get<1>(split)),
                                               cute::make_layout(get<0, 0>(split), get<2>(split))));
}

/// An accumulator of 16 x 8 tiles as left operand of the next mma, whose tiles are 16 x 16.
template <typename Tensor>
__device__ __forceinline__ auto as_left_operand(Tensor&& tensor) {
    using cute::get;
    const auto split = cute::logical_divide(tensor.layout(), Shape<cute::X, cute::X, _2>{});
    return cute::make_tensor(static_cast<Tensor&&>(tensor).data(),
                             cute::make_layout(cute::make_layout(get<0>(split), get<2, 0>(split)),
                                               get<1>(split), get<2, 1>(split)));
}

/// Writes accumulators, rounded already, to their places in a tile of shared memory.
template <typename Element, typename TiledMma, typename Fragment, typename SharedTensor>
__device__ __forceinline__ void store_accumulators(TiledMma tiled_mma, const Fragment& fragment,
                                                   SharedTensor&& shared) {
    const auto tiled_copy = cute::make_tiled_copy_C(
        cute::Copy_Atom<cute::AutoVectorizingCopyWithAssumedAlignment<32>, Element>{}, tiled_mma);
    const auto thread_copy = tiled_copy.get_thread_slice(threadIdx.x);
    cute::copy(tiled_copy, thread_copy.retile_S(fragment), thread_copy.partition_D(shared));
}

}  // namespace lemo::cuda::segment_attention::portable
