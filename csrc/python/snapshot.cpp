// Whether a network is still what it was when an engine was made of it, as each call asks.
#include <cstdint>
#include <vector>

#include "python/bindings.h"
#include "python/pointer.h"
#include "runtime/fingerprint.h"

namespace py = pybind11;

namespace advkd {
namespace {

// The lists of advkd/engine/cache.py, made together and never changed.

bool have_types(const py::list& objects, const py::list& types) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(objects.ptr()); ++i) {
    const PyTypeObject* const type = Py_TYPE(PyList_GET_ITEM(objects.ptr(), i));
    if (reinterpret_cast<const PyObject*>(type) != PyList_GET_ITEM(types.ptr(), i)) return false;
  }
  return true;
}

bool hold_values(const py::list& tables, const py::list& sizes, const py::list& values) {
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tables.ptr()); ++i) {
    PyObject* const table = PyList_GET_ITEM(tables.ptr(), i);
    const Py_ssize_t size = PyLong_AsSsize_t(PyList_GET_ITEM(sizes.ptr(), i));
    if (!PyDict_Check(table) || PyDict_Size(table) != size) return false;
    Py_ssize_t place = 0;
    PyObject* value;
    while (PyDict_Next(table, &place, nullptr, &value)) {
      if (value != PyList_GET_ITEM(values.ptr(), at++)) return false;
    }
  }
  return true;
}

// What is used of DLPack's exchange of tensors, version 1 (github.com/dmlc/dlpack).
struct DlTensor {
  std::uint64_t data;
  std::int32_t device_type, device_id, dimensions;
  std::uint8_t type_code, type_bits;
  std::uint16_t type_lanes;
  const std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};
struct DlExchange {
  std::uint32_t major, minor;
  const DlExchange* before;  // of another version
  void *allocate, *owned_from_object, *owned_to_object;
  int (*tensor_of)(PyObject* object, DlTensor* out);  // not 0: with an exception of Python
  void* current_stream;
};

py::object layouts_of(const py::capsule& exchange, const py::list& tensors) {
  const auto* const api = exchange.get_pointer<const DlExchange>();
  if (api->major != 1) return py::none();
  std::vector<std::int64_t> all;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    DlTensor t;
    if (api->tensor_of(PyList_GET_ITEM(tensors.ptr(), i), &t) != 0) throw py::error_already_set();
    all.insert(all.end(), {static_cast<std::int64_t>(t.data + t.byte_offset), t.device_type,
                           t.device_id, t.type_code, t.type_bits, t.type_lanes, t.dimensions});
    all.insert(all.end(), t.shape, t.shape + t.dimensions);
    all.insert(all.end(), t.strides, t.strides + t.dimensions);
  }
  return py::bytes(reinterpret_cast<const char*>(all.data()), all.size() * sizeof all[0]);
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
  module.def("layouts", &layouts_of,
             "Addresses, devices, dtypes, shapes and strides of tensors, as bytes to compare; None "
             "where `exchange`, the capsule of torch.Tensor.__dlpack_c_exchange_api__, is of "
             "another version.");
  module.def("fingerprint", &fingerprint_of,
             "A number that tells runs of memory from others; `runs` is the address of their "
             "addresses and numbers of floats, int64.");
}

}  // namespace advkd
