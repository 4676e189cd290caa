// lemo._C: host objects (plans of blocks, loss chunks and memory, what this build supports). Never
// tensors.
//
// In the part of Python's C API that stays the same from 3.10 on (Py_LIMITED_API), so that one
// build serves every Python since.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lemo/blocks.h"
#include "lemo/check.h"
#include "lemo/memory_plan.h"

namespace {

/// Python has an error set: to be left by returning nullptr.
struct PythonError {};

struct Release {
    void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

Object owned(PyObject* object) {
    if (!object) throw PythonError{};
    return Object(object);
}

int64_t to_int64(PyObject* object) {
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw PythonError{};
    return value;
}

/// f(item) of every item of a Python sequence.
template <typename F>
void for_each(PyObject* sequence, F f) {
    const Object list = owned(PySequence_List(sequence));
    const Py_ssize_t size = PyList_Size(list.get());
    for (Py_ssize_t i = 0; i < size; ++i) f(PyList_GetItem(list.get(), i));
}

std::vector<int64_t> to_numbers(PyObject* sequence) {
    std::vector<int64_t> numbers;
    for_each(sequence, [&](PyObject* item) { numbers.push_back(to_int64(item)); });
    return numbers;
}

lemo::LayerOptions to_options(PyObject* layers) {
    lemo::LayerOptions made;
    for_each(layers, [&](PyObject* options) {
        std::vector<lemo::LayerOption>& layer = made.emplace_back();
        for_each(options, [&](PyObject* option) {
            const Object tuple = owned(PySequence_Tuple(option));
            long long kept = 0, forward = 0, backward = 0, host = 0, moving = 0;
            double seconds = 0;
            if (!PyArg_ParseTuple(tuple.get(), "LLLLdL:an option of a layer", &kept, &forward,
                                  &backward, &host, &seconds, &moving)) {
                throw PythonError{};
            }
            layer.push_back({kept, forward, backward, host, seconds, moving});
        });
    });
    return made;
}

template <typename Int>
Object to_list(const std::vector<Int>& numbers) {
    Object list = owned(PyList_New(static_cast<Py_ssize_t>(numbers.size())));
    for (size_t i = 0; i < numbers.size(); ++i) {
        // Takes the number over.
        Object number = owned(PyLong_FromLongLong(numbers[i]));
        PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i), number.release());
    }
    return list;
}

template <typename... Results>
void parse(PyObject* args, PyObject* kwargs, const char* format, const char* const* names,
           Results*... results) {
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, const_cast<char**>(names), results...)) {
        throw PythonError{};
    }
}

PyObject* plan_blocks(PyObject* args, PyObject* kwargs) {
    static const char* const names[] = {"seqlens", "block_size", nullptr};
    PyObject* seqlens = nullptr;
    long long block_size = 0;
    parse(args, kwargs, "OL:plan_blocks", names, &seqlens, &block_size);
    const lemo::BlockPlan plan = lemo::plan_blocks(to_numbers(seqlens), block_size);
    const Object starts = to_list(plan.block_starts), cuts = to_list(plan.cu_blocks);
    return PyTuple_Pack(2, starts.get(), cuts.get());
}

PyObject* plan_selection(PyObject* args, PyObject* kwargs) {
    static const char* const names[] = {"seqlens",    "block_size", "value",
                                        "keep_first", "keep_last",  nullptr};
    PyObject* seqlens = nullptr;
    long long block_size = 0, keep_first = 0, keep_last = 0;
    double value = 0;
    parse(args, kwargs, "OLdLL:plan_selection", names, &seqlens, &block_size, &value, &keep_first,
          &keep_last);
    const lemo::SelectionSize size =
        lemo::plan_selection(to_numbers(seqlens), block_size, value, keep_first, keep_last);
    return Py_BuildValue("LL", static_cast<long long>(size.blocks),
                         static_cast<long long>(size.rows));
}

PyObject* plan_loss_chunk(PyObject* args, PyObject* kwargs) {
    static const char* const names[] = {"rows", "vocabulary", "budget_bytes", nullptr};
    long long rows = 0, vocabulary = 0, budget_bytes = 0;
    parse(args, kwargs, "LLL:plan_loss_chunk", names, &rows, &vocabulary, &budget_bytes);
    return PyLong_FromLongLong(lemo::plan_loss_chunk(rows, vocabulary, budget_bytes));
}

PyObject* plan_memory(PyObject* args, PyObject* kwargs) {
    static const char* const names[] = {"layers",      "device",           "host",   "fixed",
                                        "granularity", "host_granularity", "states", nullptr};
    PyObject* layers = nullptr;
    long long device = 0, host = 0, fixed = 0, granularity = 1, host_granularity = 1;
    long long states = std::numeric_limits<int64_t>::max();
    parse(args, kwargs, "OLLL|LLL:plan_memory", names, &layers, &device, &host, &fixed,
          &granularity, &host_granularity, &states);
    const lemo::MemoryPlan plan = lemo::plan_memory(
        to_options(layers), {device, host, fixed, granularity, host_granularity, states});
    const Object options = to_list(plan.options);
    return Py_BuildValue("OdLL", options.get(), plan.seconds, static_cast<long long>(plan.peak),
                         static_cast<long long>(plan.host));
}

PyObject* least_memory(PyObject* args, PyObject* kwargs) {
    static const char* const names[] = {"layers",           "host", "fixed", "granularity",
                                        "host_granularity", nullptr};
    PyObject* layers = nullptr;
    long long host = 0, fixed = 0, granularity = 1, host_granularity = 1;
    parse(args, kwargs, "OLL|LL:least_memory", names, &layers, &host, &fixed, &granularity,
          &host_granularity);
    return PyLong_FromLongLong(
        lemo::least_memory(to_options(layers), {0, host, fixed, granularity, host_granularity}));
}

PyObject* build_info(PyObject*, PyObject*) {
    const Object cuda = owned(PyBool_FromLong(LEMO_BUILT_WITH_CUDA));
    return Py_BuildValue("{s:s,s:O,s:s,s:s}", "version", LEMO_VERSION, "cuda", cuda.get(),
                         "cuda_architectures", LEMO_CUDA_ARCHITECTURES, "compiler", __VERSION__);
}

/// A function as Python calls it: errors of C++ become Python's.
template <PyObject* (*function)(PyObject*, PyObject*)>
PyObject* call(PyObject*, PyObject* args, PyObject* kwargs) {
    try {
        return function(args, kwargs);
    } catch (const PythonError&) {
    } catch (const lemo::Error& error) {
        // what() starts with "[lemo:<kind>] ", which only the torch ops need.
        const std::string text = error.what();
        PyObject* type = error.kind() == lemo::ErrorKind::kType    ? PyExc_TypeError
                         : error.kind() == lemo::ErrorKind::kValue ? PyExc_ValueError
                                                                   : PyExc_NotImplementedError;
        PyErr_SetString(type, text.substr(text.find("] ") + 2).c_str());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

template <PyObject* (*function)(PyObject*, PyObject*)>
PyMethodDef method(const char* name, const char* text) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call<function>)),
            METH_VARARGS | METH_KEYWORDS, text};
}

PyMethodDef methods[] = {
    method<plan_blocks>("plan_blocks",
                        "(block_starts [B+1], cu_blocks [N+1]) of sequences cut into blocks of "
                        "block_size tokens."),
    method<plan_selection>("plan_selection",
                           "(blocks, rows) that the ratio policy keeps; rows -1 where they depend "
                           "on the scores."),
    method<plan_loss_chunk>("plan_loss_chunk",
                            "Rows of one loss chunk whose fp32 logits take at most budget_bytes."),
    method<plan_memory>(
        "plan_memory",
        "(option of each layer, seconds, peak bytes, host bytes) of the fastest plan within the "
        "limits; no options where none fits. An option is (kept, forward, backward, host bytes, "
        "seconds, bytes that move while the next layer runs)."),
    method<least_memory>("least_memory",
                         "The fewest bytes that a plan of these layers needs; -1 where the host's "
                         "bound rules out every plan."),
    method<build_info>("build_info",
                       "What this build is: version, whether it has CUDA kernels and for which "
                       "architectures."),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Host objects of lemo's C++ core.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
