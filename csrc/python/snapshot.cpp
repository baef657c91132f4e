// Whether a network is still what it was when an engine was made of it, at a call's every turn.
#include <cstddef>
#include <cstdint>

#include "python/bindings.h"
#include "python/pointer.h"
#include "runtime/fingerprint.h"

namespace py = pybind11;

namespace advkd {
namespace {

bool have_types(const py::list& objects, const py::list& types) {
  for (std::size_t i = 0; i < objects.size(); ++i) {
    const auto* const type = reinterpret_cast<const PyObject*>(Py_TYPE(objects[i].ptr()));
    if (type != types[i].ptr()) return false;
  }
  return true;
}

bool hold_values(const py::list& tables, const py::list& sizes, const py::list& values) {
  Py_ssize_t at = 0;
  for (std::size_t i = 0; i < tables.size(); ++i) {
    PyObject* const table = tables[i].ptr();
    if (!PyDict_Check(table) || PyDict_Size(table) != PyLong_AsSsize_t(sizes[i].ptr())) {
      return false;
    }
    Py_ssize_t place = 0;
    PyObject* value;
    while (PyDict_Next(table, &place, nullptr, &value)) {
      if (value != PyList_GET_ITEM(values.ptr(), at++)) return false;
    }
  }
  return true;
}

// Of (address, floats) each.
std::uint64_t fingerprint_of(std::uintptr_t runs, std::int64_t count) {
  const py::gil_scoped_release released;
  const std::int64_t* run = pointer<const std::int64_t>(runs);
  Fingerprint fingerprint;
  for (std::int64_t i = 0; i < count; ++i, run += 2) {
    fingerprint.add(pointer<const char>(static_cast<std::uintptr_t>(run[0])),
                    run[1] * static_cast<std::int64_t>(sizeof(float)));
  }
  return fingerprint.value();
}

}  // namespace

void bind_snapshot(py::module_& module) {
  module.def("have_types", &have_types, "Whether each object is of its type, and of no subclass.");
  module.def("hold_values", &hold_values,
             "Whether dictionaries, of these sizes, hold these very values, one after the other.");
  module.def("fingerprint", &fingerprint_of,
             "A number that tells runs of memory from others; `runs` is the address of their "
             "addresses and numbers of floats, int64.");
}

}  // namespace advkd
