// residual_scatter on CUDA: one warp for each kept row, 16-byte accesses, one writer, no atomics.
#include "lemo/residual_scatter.h"

#include <algorithm>

#include "common/launch.h"
#include "common/vector.h"

namespace lemo {
namespace {

constexpr int kWarpsPerBlock = 8;
// Vectors that a lane loads before it stores the first.
constexpr int kInFlight = 4;

/// Copies or adds packed rows. Packed row r belongs to stream row `rows[r]`, or r without `rows`.
template <typename Stream, typename Packed, bool kScatter>
__global__ void __launch_bounds__(kWarpsPerBlock * 32)
residual_rows_kernel(Stream* __restrict__ stream, Packed* __restrict__ packed,
                     const int32_t* __restrict__ rows, int64_t num_rows, int64_t hidden,
                     bool vectorised) {
    // The wider type decides how many elements make one 16-byte access of it.
    constexpr int kElements = 16 / (sizeof(Stream) > sizeof(Packed) ? sizeof(Stream)
                                                                     : sizeof(Packed));
    const int64_t row_idx = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
    if (row_idx >= num_rows) return;
    Stream* x = stream + (rows ? int64_t{rows[row_idx]} : row_idx) * hidden;
    Packed* y = packed + row_idx * hidden;
    const int lane = threadIdx.x % 32;

    const int64_t vector_end = vectorised ? hidden : 0;
    for (int64_t first = lane * kElements; first < vector_end;
         first += kInFlight * 32 * kElements) {
        // All loads before the first store: the compiler may not move one past the other.
        cutlass::AlignedArray<Stream, kElements> from_stream[kInFlight];
        cutlass::AlignedArray<Packed, kElements> from_packed[kInFlight];
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kInFlight; ++v) {
            const int64_t i = first + v * 32 * kElements;
            if (i >= vector_end) continue;
            from_stream[v] = cuda::load_vector<kElements>(x + i);
            if constexpr (kScatter) from_packed[v] = cuda::load_vector<kElements>(y + i);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int v = 0; v < kInFlight; ++v) {
            const int64_t i = first + v * 32 * kElements;
            if (i >= vector_end) continue;
            if constexpr (kScatter) {
                CUTLASS_PRAGMA_UNROLL
                for (int e = 0; e < kElements; ++e) {
                    from_stream[v][e] =
                        Stream(float(from_stream[v][e]) + float(from_packed[v][e]));
                }
                cuda::store_vector<kElements>(x + i, from_stream[v]);
            } else {
                cuda::store_vector<kElements>(y + i, from_stream[v]);
            }
        }
    }
    for (int64_t i = vector_end + lane; i < hidden; i += 32) {
        if constexpr (kScatter) {
            x[i] = Stream(float(x[i]) + float(y[i]));
        } else {
            y[i] = x[i];
        }
    }
}

template <typename Stream, typename Packed, bool kScatter>
void launch(const Tensor& stream_tensor, const Tensor& packed, const Tensor& rows,
            const char* op, void* stream) {
    const int64_t num_rows = packed.size(0);
    if (num_rows == 0 || packed.size(1) == 0) return;
    // Both rows are walked in steps of the wider type's 16 bytes, 8 of the narrower one's.
    const int64_t row_bytes = packed.size(1) * std::min(sizeof(Stream), sizeof(Packed)) *
                              (sizeof(Stream) == sizeof(Packed) ? 1 : 2);
    const bool vectorised = cuda::vectorisable(row_bytes, {stream_tensor.data, packed.data});
    const auto grid = static_cast<unsigned>(ceil_div<int64_t>(num_rows, kWarpsPerBlock));
    residual_rows_kernel<Stream, Packed, kScatter>
        <<<grid, kWarpsPerBlock * 32, 0, static_cast<cudaStream_t>(stream)>>>(
            stream_tensor.as<Stream>(), packed.as<Packed>(),
            rows ? rows.as<const int32_t>() : nullptr, num_rows, stream_tensor.size(1), vectorised);
    cuda::check_launch(op);
}

}  // namespace

void residual_scatter_cuda(const ResidualScatterParams& params, void* stream) {
    cuda::dispatch_float(params.x.dtype, [&]<typename X>(X) {
        cuda::dispatch_float(params.y.dtype, [&]<typename Y>(Y) {
            launch<X, Y, true>(params.x, params.y, params.rows, "residual_scatter", stream);
        });
    });
}

void gather_rows_cuda(const GatherRowsParams& params, void* stream) {
    cuda::dispatch_float(params.dx.dtype, [&]<typename T>(T) {
        launch<T, T, false>(params.x, params.y, params.rows, "gather_rows",
                            stream);
    });
}

}  // namespace lemo
