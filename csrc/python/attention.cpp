#include <pybind11/stl.h>

#include <array>
#include <type_traits>

#include "python/bindings.h"
#include "python/pointer.h"
#include "runtime/dispatch.h"
#include "runtime/training_kernels.h"

namespace py = pybind11;

namespace advkd {
namespace {

// (address, strides of sample, head and row)
using Operand = std::array<std::int64_t, 4>;
// (batch, heads, queries, keys, head_dim)
using Sizes = std::array<std::int64_t, 5>;

template <class T>
HeadRows<T> head_rows(const Operand& operand) {
  return {pointer<T>(static_cast<std::uintptr_t>(operand[0])), operand[1], operand[2], operand[3]};
}

AttentionShape attention_shape(const Sizes& sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

template <class T>
void attention(const Operand& q, const Operand& k, const Operand& v, const Operand& out,
               std::uintptr_t lse, const Sizes& sizes, double scale, int threads) {
  const py::gil_scoped_release released;
  const AttentionArgs<T> args = {
      head_rows<const T>(q), head_rows<const T>(k), head_rows<const T>(v), head_rows<T>(out),
      pointer<T>(lse), attention_shape(sizes), static_cast<T>(scale), nullptr,
      threads};
  if constexpr (std::is_same_v<T, float>) {
    kernels().attention_float32(args);
  } else {
    training_kernels().attention_float64(args);
  }
}

template <class T>
void attention_backward(const Operand& grad_out, const Operand& q, const Operand& k,
                        const Operand& v, const Operand& out, std::uintptr_t lse,
                        const Operand& dq, const Operand& dk, const Operand& dv,
                        const Sizes& sizes, double scale, int threads) {
  const py::gil_scoped_release released;
  const AttentionBackwardArgs<T> args = {
      head_rows<const T>(grad_out), head_rows<const T>(q), head_rows<const T>(k),
      head_rows<const T>(v), head_rows<const T>(out), pointer<const T>(lse), head_rows<T>(dq),
      head_rows<T>(dk), head_rows<T>(dv), attention_shape(sizes), static_cast<T>(scale), threads};
  if constexpr (std::is_same_v<T, float>) {
    training_kernels().attention_backward_float32(args);
  } else {
    training_kernels().attention_backward_float64(args);
  }
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_float32", &attention<float>);
  module.def("attention_float64", &attention<double>);
  module.def("attention_backward_float32", &attention_backward<float>);
  module.def("attention_backward_float64", &attention_backward<double>);
}

}  // namespace advkd
