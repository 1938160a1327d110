// What fastops.fuse asks before every call of a fused forward: whether the modules that it stands for are what they
// were.
#include "binding.h"

namespace fastops {
namespace {

// A call costs one look-up for each key: none of what is looked at can be changed without these dictionaries.
//
// watched: (id of the module, modules, entries, empty, sizes).
// modules: for each module a tuple (module, its class, its __dict__, the number of entries of that, key, value, ...):
//   the values are the same objects, and it has no hooks. None, ..., None for the module that asks: what it keeps must
//   not keep it alive.
// entries: for each a tuple (a dictionary, key, value): the value is the same object; Ellipsis: it is there, and not
// None. empty: dictionaries that have nothing in them. sizes: tuples (a dictionary, how many entries it has).
struct Names {
  PyObject* hooks[4] = {PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
                        PyUnicode_InternFromString("_backward_hooks"),
                        PyUnicode_InternFromString("_backward_pre_hooks")};
};

bool same(PyObject* dict, PyObject* key, PyObject* value) {
  PyObject* const now = PyDict_GetItemWithError(dict, key);
  return value == Py_Ellipsis ? now && now != Py_None : now == value;
}

bool module_is_the_same(PyObject* watched, PyObject* asking, const Names& names) {
  PyObject** const items = PySequence_Fast_ITEMS(watched);
  PyObject *module = items[0], *dict = items[2];
  if (module == Py_None) {
    module = asking;
    dict = PyObject_GenericGetDict(module, nullptr);
    Py_XDECREF(dict);  // the module holds it
    if (!dict) throw py::error_already_set();
  }
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != items[1] || PyDict_GET_SIZE(dict) != PyLong_AsSsize_t(items[3]))
    return false;
  for (PyObject* name : names.hooks) {
    PyObject* const hooks = PyDict_GetItemWithError(dict, name);
    if (hooks && PyDict_Check(hooks) && PyDict_GET_SIZE(hooks)) return false;
  }
  const Py_ssize_t count = PyTuple_GET_SIZE(watched);
  for (Py_ssize_t i = 4; i + 1 < count; i += 2)
    if (!same(dict, items[i], items[i + 1])) return false;
  return true;
}

py::object unchanged(py::handle watched, py::handle module) {
  static const Names names;
  PyObject** const items = PySequence_Fast_ITEMS(watched.ptr());
  if (PyLong_AsVoidPtr(items[0]) != module.ptr()) return py::bool_(false);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[1]); ++i)
    if (!module_is_the_same(PyTuple_GET_ITEM(items[1], i), module.ptr(), names)) return py::bool_(false);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[2]); ++i) {
    PyObject** const entry = PySequence_Fast_ITEMS(PyTuple_GET_ITEM(items[2], i));
    if (!same(entry[0], entry[1], entry[2])) return py::bool_(false);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[3]); ++i)
    if (PyDict_GET_SIZE(PyTuple_GET_ITEM(items[3], i))) return py::bool_(false);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[4]); ++i) {
    PyObject** const entry = PySequence_Fast_ITEMS(PyTuple_GET_ITEM(items[4], i));
    if (PyDict_GET_SIZE(entry[0]) != PyLong_AsSsize_t(entry[1])) return py::bool_(false);
  }
  return py::bool_(true);
}

}  // namespace

void bind_guard(py::module_& m) { fast_def<&unchanged>(m, "unchanged"); }

}  // namespace fastops
