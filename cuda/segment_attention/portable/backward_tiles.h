// The tiles of a thread block of the main backward kernel: where they lie in shared and in global
// memory, and the copies between the two.
#pragma once

#include "common/async_copy.h"
#include "segment_attention/portable/backward_traits.h"
#include "segment_attention/query_walk.h"

namespace lemo::cuda::segment_attention::portable {

/// The tiles in shared memory, one after another. K and V stay for the whole kernel. Q and the
/// statistics have two buffers, and dO where there is room: the tiles of the next step arrive in
/// one while the other is multiplied.
template <typename Traits>
struct BackwardShared {
    using Element = typename Traits::Element;
    Element* first;

    __device__ __forceinline__ explicit BackwardShared(std::byte* bytes)
        : first(reinterpret_cast<Element*>(bytes)) {}

    __device__ __forceinline__ auto k() const { return tile<typename Traits::LayoutK>(first); }
    __device__ __forceinline__ auto v() const {
        return tile<typename Traits::LayoutV>(behind(k()));
    }
    __device__ __forceinline__ auto q(int buffer) const {
        return buffer_of(tile<typename Traits::LayoutQ>(behind(v())), buffer);
    }
    __device__ __forceinline__ auto dout(int buffer) const {
        return buffer_of(first_dout(), Traits::kBuffersOfdO == 2 ? buffer : 0);
    }
    /// Probabilities, and the gradient of the scores, [queries, keys].
    __device__ __forceinline__ auto p() const {
        return tile<typename Traits::LayoutS>(behind(first_dout(), Traits::kBuffersOfdO));
    }
    __device__ __forceinline__ auto ds() const {
        return tile<typename Traits::LayoutS>(behind(p()));
    }
    /// [2, kBlockM], see BackwardArguments::statistics.
    __device__ __forceinline__ float2* statistics() const {
        return reinterpret_cast<float2*>(behind(ds()));
    }

private:
    __device__ __forceinline__ auto first_dout() const {
        return tile<typename Traits::LayoutdO>(
            behind(tile<typename Traits::LayoutQ>(behind(v())), 2));
    }

    template <typename TileLayout>
    __device__ __forceinline__ static auto tile(Element* at) {
        return cute::make_tensor(cute::make_smem_ptr(at), TileLayout{});
    }

    template <typename Tile>
    __device__ __forceinline__ static Element* behind(const Tile& tile, int buffers = 1) {
        return &*(tile.data() + buffers * cute::size(tile));
    }

    template <typename Tile>
    __device__ static auto buffer_of(const Tile& first, int index) {
        return cute::make_tensor(first.data() + index * cute::size(first), first.layout());
    }
};

/// Rows in global memory of the keys that a thread block owns and of the queries that see them, and
/// their copies to shared memory. The caller commits the copies and waits for them.
template <typename Traits>
class BackwardRows {
public:
    using Element = typename Traits::Element;

    __device__ __forceinline__ BackwardRows(const BackwardArguments& args, const SequenceTile& tile,
                                            int kv_head, const BackwardShared<Traits>& shared)
        : args_(args), tile_(tile), shared_(shared),
          value_dim_(kOne ? args.head_dim : args.value_dim),
          q_stride_(int64_t{args.num_heads} * args.head_dim),
          k_stride_(int64_t{args.num_kv_heads} * args.head_dim),
          out_stride_(kOne ? q_stride_ : int64_t{args.num_heads} * value_dim_),
          v_stride_(kOne ? k_stride_ : int64_t{args.num_kv_heads} * value_dim_),
          n_first_(tile.tile * kBlockN), keys_left_(tile.num_k - n_first_) {
        const int64_t first_key = int64_t{tile.k_first} + n_first_;
        k_offset_ = first_key * k_stride_ + int64_t{kv_head} * args.head_dim;
        v_offset_ = kOne ? k_offset_ : first_key * v_stride_ + int64_t{kv_head} * value_dim_;
    }

    /// The first key, as a row of its sequence.
    __device__ __forceinline__ int n_first() const { return n_first_; }

    /// The block's rows of an array that is as K is, or as V is.
    template <typename T>
    __device__ GlobalRows<T> like_keys(T* base) const {
        return {base + k_offset_, k_stride_, keys_left_, args_.head_dim};
    }
    template <typename T>
    __device__ GlobalRows<T> like_values(T* base) const {
        return {base + v_offset_, v_stride_, keys_left_, value_dim_};
    }

    /// K and V, once.
    __device__ __forceinline__ void load_keys_and_values() const {
        load_tile_async<kThreads, kBlockN, kHeadDim>(
            like_keys(static_cast<const Element*>(args_.k)), shared_.k());
        load_tile_async<kThreads, kBlockN, kValueDim>(
            like_values(static_cast<const Element*>(args_.v)), shared_.v());
    }

    /// Q of a tile of queries and one head to `q`, one of its buffers.
    template <typename Tile>
    __device__ void load_queries(const QueryStep& at, const Tile& q) const {
        load_tile_async<kThreads, kBlockM, kHeadDim>(
            query_rows(args_.q, q_stride_, args_.head_dim, at), q);
    }

    /// dO of the same rows to `dout`.
    template <typename Tile>
    __device__ void load_dout(const QueryStep& at, const Tile& dout) const {
        load_tile_async<kThreads, kBlockM, kValueDim>(
            query_rows(args_.dout, out_stride_, value_dim_, at), dout);
    }

    /// The statistics of the same rows. By way of shared memory: a load into registers would hold
    /// up the first mma, which waits for the same scoreboard. Rows past the end get zeros, and with
    /// dO = 0 add nothing.
    __device__ void load_statistics(const QueryStep& at, int buffer) const {
        if (threadIdx.x >= kBlockM) return;
        const int row = at.m_tile * kBlockM + static_cast<int>(threadIdx.x);
        const int64_t from = int64_t{at.head} * args_.plan.num_queries + tile_.q_first + row;
        cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint64_t>::copy(
            reinterpret_cast<const uint64_t&>(args_.statistics[from]),
            reinterpret_cast<uint64_t&>(shared_.statistics()[buffer * kBlockM + threadIdx.x]),
            row < tile_.num_q);
    }

private:
    static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
    static constexpr int kHeadDim = Traits::kHeadDim, kValueDim = Traits::kValueDim;
    static constexpr int kThreads = Traits::kThreads;
    // Whether the rows of values and output are as those of keys and queries.
    static constexpr bool kOne = kOneSize<kHeadDim>;

    __device__ GlobalRows<const Element> query_rows(const void* base, int64_t stride, int columns,
                                                    const QueryStep& at) const {
        const int row = at.m_tile * kBlockM;
        const int64_t offset = (int64_t{tile_.q_first} + row) * stride + int64_t{at.head} * columns;
        return {static_cast<const Element*>(base) + offset, stride, tile_.num_q - row, columns};
    }

    const BackwardArguments& args_;
    const SequenceTile& tile_;
    const BackwardShared<Traits>& shared_;
    int value_dim_;
    int64_t q_stride_, k_stride_, out_stride_, v_stride_;
    int n_first_, keys_left_;
    int64_t k_offset_, v_offset_;
};

}  // namespace lemo::cuda::segment_attention::portable
