#include "common/tensor_map.h"

#include <cuda_runtime.h>

#include <string>

#include "common/launch.h"

namespace lemo::cuda {
namespace {

constexpr cuuint64_t kElementBytes = 2;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, found at run time: a library that linked to the driver would not load on
/// a machine without a GPU.
EncodeTiled find_encode_tiled(const char* op) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check_status(op, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                      cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) {
        throw Error(ErrorKind::kUnsupported,
                    std::string(op) + ": the CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<EncodeTiled>(function);
}

}  // namespace

CUtensorMap make_tensor_map(const char* op, const Tensor& tensor, int box_rows) {
    static const EncodeTiled encode_tiled = find_encode_tiled(op);
    CUtensorMap map{};
    if (tensor.num_elements() == 0) return map;
    const auto heads = static_cast<cuuint64_t>(tensor.size(1));
    const auto head_dim = static_cast<cuuint64_t>(tensor.size(2));
    // The fastest dimension first.
    const cuuint64_t sizes[] = {head_dim, heads, static_cast<cuuint64_t>(tensor.size(0))};
    const cuuint64_t strides[] = {head_dim * kElementBytes, heads * head_dim * kElementBytes};
    const cuuint32_t box[] = {kCopyColumns, 1, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[] = {1, 1, 1};
    const CUtensorMapDataType type = tensor.dtype == DType::kBFloat16
                                         ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult status =
        encode_tiled(&map, type, 3, tensor.data, sizes, strides, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw Error(ErrorKind::kUnsupported, std::string(op) +
                                                 ": CUDA failed: cuTensorMapEncodeTiled returned " +
                                                 std::to_string(static_cast<int>(status)));
    }
    return map;
}

}  // namespace lemo::cuda
