// What fastops.fuse asks before every call of a fused forward: whether the modules that it stands for are what they
// were.
#include "binding.h"

namespace fastops {
namespace {

// A call costs one look-up for each key: none of what is looked at can be changed without these dictionaries.
//
// watched: (id of the module, modules, entries, empty, sizes, contents).
// modules: for each module a tuple (module, its class, its __dict__, the number of entries of that, key, value, ...):
//   the values are the same objects, and it has no hooks. None, ..., None for the module that asks: what it keeps must
//   not keep it alive.
// entries: for each a tuple (place, key, value): the value is the same object; Ellipsis: it is there, and not None. A
// place is a dictionary, a cell of a closure, or any object with this attribute. empty: dictionaries that have nothing
// in them. sizes: tuples (a dictionary, how many entries it has). contents: tuples (a list, its items), where these are
// the same objects, and (a dictionary, a copy) and (a set, a copy).
struct HookNames {
  PyObject* hooks[4] = {PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
                        PyUnicode_InternFromString("_backward_hooks"),
                        PyUnicode_InternFromString("_backward_pre_hooks")};
};

bool is_value(PyObject* now, PyObject* value) { return value == Py_Ellipsis ? now && now != Py_None : now == value; }

bool is_same(PyObject* place, PyObject* key, PyObject* value) {
  if (PyDict_Check(place)) return is_value(PyDict_GetItemWithError(place, key), value);
  if (PyCell_Check(place)) return is_value(PyCell_GET(place), value);
  PyObject* const now = PyObject_GetAttr(place, key);
  if (!now) PyErr_Clear();
  const bool result = is_value(now, value);
  Py_XDECREF(now);
  return result;
}

bool same_contents(PyObject* place, PyObject* before) {
  if (PyList_Check(place)) {
    const Py_ssize_t count = PyTuple_GET_SIZE(before);
    if (PyList_GET_SIZE(place) != count) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (PyList_GET_ITEM(place, i) != PyTuple_GET_ITEM(before, i)) return false;
    return true;
  }
  if (PyDict_Check(place)) {
    if (PyDict_GET_SIZE(place) != PyDict_GET_SIZE(before)) return false;
    PyObject *key, *value;
    for (Py_ssize_t i = 0; PyDict_Next(before, &i, &key, &value);)
      if (PyDict_GetItemWithError(place, key) != value) return false;
    return true;
  }
  const int equal = PyObject_RichCompareBool(place, before, Py_EQ);
  if (equal < 0) PyErr_Clear();
  return equal == 1;
}

bool module_is_the_same(PyObject* watched, PyObject* asking, const HookNames& names) {
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
    if (!is_value(PyDict_GetItemWithError(dict, items[i]), items[i + 1])) return false;
  return true;
}

py::object unchanged(py::handle watched, py::handle module) {
  static const HookNames names;
  PyObject** const items = PySequence_Fast_ITEMS(watched.ptr());
  if (PyLong_AsVoidPtr(items[0]) != module.ptr()) return py::bool_(false);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[1]); ++i)
    if (!module_is_the_same(PyTuple_GET_ITEM(items[1], i), module.ptr(), names)) return py::bool_(false);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[2]); ++i) {
    PyObject** const entry = PySequence_Fast_ITEMS(PyTuple_GET_ITEM(items[2], i));
    if (!is_same(entry[0], entry[1], entry[2])) return py::bool_(false);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[3]); ++i)
    if (PyDict_GET_SIZE(PyTuple_GET_ITEM(items[3], i))) return py::bool_(false);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[4]); ++i) {
    PyObject** const entry = PySequence_Fast_ITEMS(PyTuple_GET_ITEM(items[4], i));
    if (PyDict_GET_SIZE(entry[0]) != PyLong_AsSsize_t(entry[1])) return py::bool_(false);
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items[5]); ++i) {
    PyObject** const entry = PySequence_Fast_ITEMS(PyTuple_GET_ITEM(items[5], i));
    if (!same_contents(entry[0], entry[1])) return py::bool_(false);
  }
  return py::bool_(true);
}

}  // namespace

void bind_guard(py::module_& m) { fast_def<&unchanged>(m, "unchanged"); }

}  // namespace fastops
