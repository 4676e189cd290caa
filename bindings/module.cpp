// lemo._C: host objects (block plans, loss chunks, what this build supports). Never tensors.
//
// Written against Python's stable ABI (Py_LIMITED_API), so that one build serves every Python from
// 3.10 on, as liblemo_ops.so serves every torch.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "lemo/blocks.h"
#include "lemo/check.h"

namespace {

struct Release {
    void operator()(PyObject* object) const { Py_XDECREF(object); }
};

/// An owned reference.
using Object = std::unique_ptr<PyObject, Release>;

/// A Python exception is set; it ends the call.
struct PythonError {};

Object checked(PyObject* object) {
    if (object == nullptr) throw PythonError{};
    return Object(object);
}

/// Runs `body` as the body of a Python function; lemo's errors become Python's.
template <typename Body>
PyObject* call(const Body& body) {
    try {
        return body().release();
    } catch (const PythonError&) {
        return nullptr;
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

std::vector<int64_t> integers(PyObject* sequence) {
    const Py_ssize_t size = PySequence_Size(sequence);
    if (size < 0) throw PythonError{};
    std::vector<int64_t> values;
    values.reserve(static_cast<size_t>(size));
    for (Py_ssize_t index = 0; index < size; ++index) {
        const Object item = checked(PySequence_GetItem(sequence, index));
        const long long value = PyLong_AsLongLong(item.get());
        if (value == -1 && PyErr_Occurred() != nullptr) throw PythonError{};
        values.push_back(value);
    }
    return values;
}

Object list_of(const std::vector<int32_t>& values) {
    Object list = checked(PyList_New(static_cast<Py_ssize_t>(values.size())));
    for (size_t index = 0; index < values.size(); ++index) {
        // The list takes the reference, also where it fails.
        PyObject* value = checked(PyLong_FromLong(values[index])).release();
        if (PyList_SetItem(list.get(), static_cast<Py_ssize_t>(index), value) != 0) {
            throw PythonError{};
        }
    }
    return list;
}

/// Arguments by position or name, as PyArg_ParseTupleAndKeywords reads them.
template <size_t Names, typename... Targets>
void parse(PyObject* arguments, PyObject* named, const char* format,
           const char* const (&names)[Names], Targets*... targets) {
    // Python promises not to write to the names; its type for them is older than const.
    if (!PyArg_ParseTupleAndKeywords(arguments, named, format, const_cast<char**>(names),
                                     targets...)) {
        throw PythonError{};
    }
}

PyObject* plan_blocks(PyObject*, PyObject* arguments, PyObject* named) {
    return call([&] {
        static const char* const names[] = {"seqlens", "block_size", nullptr};
        PyObject* seqlens = nullptr;
        long long block_size = 0;
        parse(arguments, named, "OL:plan_blocks", names, &seqlens, &block_size);
        const lemo::BlockPlan plan = lemo::plan_blocks(integers(seqlens), block_size);
        const Object starts = list_of(plan.block_starts);
        const Object cuts = list_of(plan.cu_blocks);
        return checked(PyTuple_Pack(2, starts.get(), cuts.get()));
    });
}

PyObject* plan_selection(PyObject*, PyObject* arguments, PyObject* named) {
    return call([&] {
        static const char* const names[] = {"seqlens",    "block_size", "value",
                                            "keep_first", "keep_last",  nullptr};
        PyObject* seqlens = nullptr;
        long long block_size = 0;
        double value = 0;
        long long keep_first = 0;
        long long keep_last = 0;
        parse(arguments, named, "OLdLL:plan_selection", names, &seqlens, &block_size, &value,
              &keep_first, &keep_last);
        const lemo::SelectionSize size =
            lemo::plan_selection(integers(seqlens), block_size, value, keep_first, keep_last);
        return checked(Py_BuildValue("(LL)", static_cast<long long>(size.blocks),
                                     static_cast<long long>(size.rows)));
    });
}

PyObject* plan_loss_chunk(PyObject*, PyObject* arguments, PyObject* named) {
    return call([&] {
        static const char* const names[] = {"rows", "vocabulary", "budget_bytes", nullptr};
        long long rows = 0;
        long long vocabulary = 0;
        long long budget = 0;
        parse(arguments, named, "LLL:plan_loss_chunk", names, &rows, &vocabulary, &budget);
        return checked(PyLong_FromLongLong(lemo::plan_loss_chunk(rows, vocabulary, budget)));
    });
}

PyObject* build_info(PyObject*, PyObject*) {
    return call([] {
        const Object cuda = checked(PyBool_FromLong(LEMO_BUILT_WITH_CUDA));
        return checked(Py_BuildValue("{s:s,s:O,s:s,s:s}", "version", LEMO_VERSION, "cuda",
                                     cuda.get(), "cuda_architectures", LEMO_CUDA_ARCHITECTURES,
                                     "compiler", __VERSION__));
    });
}

using WithNames = PyObject* (*)(PyObject*, PyObject*, PyObject*);

/// Python calls such a function by its flags; the table has the type of those without names.
PyCFunction erased(WithNames function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"plan_blocks", erased(plan_blocks), METH_VARARGS | METH_KEYWORDS,
     "(block_starts [B+1], cu_blocks [N+1]) of sequences cut into blocks of block_size tokens."},
    {"plan_selection", erased(plan_selection), METH_VARARGS | METH_KEYWORDS,
     "(blocks, rows) that the ratio policy keeps; rows -1 where they depend on the scores."},
    {"plan_loss_chunk", erased(plan_loss_chunk), METH_VARARGS | METH_KEYWORDS,
     "Rows of one loss chunk whose fp32 logits take at most budget_bytes."},
    {"build_info", build_info, METH_NOARGS,
     "What this build is: version, whether it has CUDA kernels and for which architectures."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Host objects of lemo's C++ core.",
                          0,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
