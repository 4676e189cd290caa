// lemo._C: host objects (plans of blocks, loss chunks and memory, what this build supports). Never
// tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <tuple>

#include "lemo/blocks.h"
#include "lemo/check.h"
#include "lemo/memory_plan.h"

namespace py = pybind11;

namespace {

PyObject* exception_of(lemo::ErrorKind kind) {
    switch (kind) {
        case lemo::ErrorKind::kValue: return PyExc_ValueError;
        case lemo::ErrorKind::kType: return PyExc_TypeError;
        case lemo::ErrorKind::kUnsupported: return PyExc_NotImplementedError;
        case lemo::ErrorKind::kMemory:
        case lemo::ErrorKind::kDeviceMemory: return PyExc_MemoryError;
    }
    return PyExc_RuntimeError;
}

using Option = std::tuple<int64_t, int64_t, int64_t, int64_t, double, int64_t>;

lemo::LayerOptions layer_options(const std::vector<std::vector<Option>>& layers) {
    lemo::LayerOptions made;
    for (const std::vector<Option>& options : layers) {
        std::vector<lemo::LayerOption>& layer = made.emplace_back();
        for (const auto& [kept, forward, backward, host, seconds, moving] : options) {
            layer.push_back({kept, forward, backward, host, seconds, moving});
        }
    }
    return made;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Host objects of lemo's C++ core.";

    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const lemo::Error& error) {
            // what() starts with "[lemo:<kind>] ", which only the torch ops need.
            const std::string text = error.what();
            const std::string message = text.substr(text.find("] ") + 2);
            py::set_error(exception_of(error.kind()), message.c_str());
        }
    });

    m.def(
        "plan_blocks",
        [](const std::vector<int64_t>& seqlens, int64_t block_size) {
            lemo::BlockPlan plan = lemo::plan_blocks(seqlens, block_size);
            return py::make_tuple(std::move(plan.block_starts), std::move(plan.cu_blocks));
        },
        py::arg("seqlens"), py::arg("block_size"),
        "(block_starts [B+1], cu_blocks [N+1]) of sequences cut into blocks of block_size tokens.");
    m.def(
        "plan_selection",
        [](const std::vector<int64_t>& seqlens, int64_t block_size, double value,
           int64_t keep_first, int64_t keep_last) {
            const lemo::SelectionSize size =
                lemo::plan_selection(seqlens, block_size, value, keep_first, keep_last);
            return py::make_tuple(size.blocks, size.rows);
        },
        py::arg("seqlens"), py::arg("block_size"), py::arg("value"), py::arg("keep_first"),
        py::arg("keep_last"),
        "(blocks, rows) that the ratio policy keeps; rows -1 where they depend on the scores.");
    m.def("plan_loss_chunk", &lemo::plan_loss_chunk, py::arg("rows"), py::arg("vocabulary"),
          py::arg("budget_bytes"),
          "Rows of one loss chunk whose fp32 logits take at most budget_bytes.");
    m.def(
        "plan_memory",
        [](const std::vector<std::vector<Option>>& layers, int64_t device, int64_t host,
           int64_t fixed, int64_t granularity, int64_t host_granularity, int64_t states) {
            const lemo::MemoryPlan plan =
                lemo::plan_memory(layer_options(layers),
                                  {device, host, fixed, granularity, host_granularity, states});
            return py::make_tuple(plan.options, plan.seconds, plan.peak, plan.host);
        },
        py::arg("layers"), py::arg("device"), py::arg("host"), py::arg("fixed"),
        py::arg("granularity") = 1, py::arg("host_granularity") = 1,
        py::arg("states") = std::numeric_limits<int64_t>::max(),
        "(option of each layer, seconds, peak bytes, host bytes) of the fastest plan within the "
        "limits; no options where none fits. An option is (kept, forward, backward, host bytes, "
        "seconds, bytes that move while the next layer runs).");
    m.def(
        "least_memory",
        [](const std::vector<std::vector<Option>>& layers, int64_t host, int64_t fixed,
           int64_t granularity, int64_t host_granularity) {
            return lemo::least_memory(layer_options(layers),
                                      {0, host, fixed, granularity, host_granularity});
        },
        py::arg("layers"), py::arg("host"), py::arg("fixed"), py::arg("granularity") = 1,
        py::arg("host_granularity") = 1,
        "The fewest bytes that a plan of these layers needs; -1 where the host's bound rules out "
        "every plan.");
    m.def(
        "build_info",
        [] {
            py::dict info;
            info["version"] = LEMO_VERSION;
            info["cuda"] = bool(LEMO_BUILT_WITH_CUDA);
            info["cuda_architectures"] = LEMO_CUDA_ARCHITECTURES;
            info["compiler"] = __VERSION__;
            return info;
        },
        "What this build is: version, whether it has CUDA kernels and for which architectures.");
}
