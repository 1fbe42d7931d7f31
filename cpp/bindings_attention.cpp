// Attention for Python: tensors come as addresses and strides, checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "attention.h"
#include "kernels.h"

namespace py = pybind11;

namespace sparseprop {
namespace {

using Address = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;                        // batch, head, row
using MaskAddress = std::tuple<uintptr_t, bool, int64_t, int64_t, int64_t, int64_t>;  // bytes?; batch, head, query, key

Heads heads(const Address& a) {
  return {reinterpret_cast<float*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a)};
}

AttentionMask masked(const MaskAddress& a) {
  return {reinterpret_cast<const void*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a), std::get<4>(a), std::get<5>(a)};
}

AttentionSizes checked(int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t width, int64_t value_width,
                       float scale, bool causal) {
  const bool some = batch > 0 && heads > 0 && queries > 0 && keys > 0 && width > 0 && value_width > 0;
  if (!some || width % lanes<float>() || value_width % lanes<float>())
    throw std::invalid_argument("attention needs at least one element, and widths that are multiples of 16");
  return {batch, heads, queries, keys, width, value_width, scale, causal};
}

}  // namespace
}  // namespace sparseprop

void bind_attention(py::module_& m) {
  using namespace sparseprop;
  py::class_<AttentionSizes>(m, "AttentionSizes")
      .def(py::init(&checked), py::arg("batch"), py::arg("heads"), py::arg("queries"), py::arg("keys"), py::arg("width"),
           py::arg("value_width"), py::arg("scale"), py::arg("causal"));
  m.def("attention", [](const AttentionSizes& sizes, const Address& q, const Address& k, const Address& v,
                        const MaskAddress& mask, const Address& out, uintptr_t stats) {
    const py::gil_scoped_release release;
    attention(sizes, heads(q), heads(k), heads(v), masked(mask), heads(out), reinterpret_cast<float*>(stats));
  }, py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("out"), py::arg("stats"));
  m.def("attention_backward", [](const AttentionSizes& sizes, const Address& q, const Address& k, const Address& v,
                                 const MaskAddress& mask, uintptr_t stats, const Address& grad_out, const Address& grad_q,
                                 const Address& grad_k, const Address& grad_v) {
    const py::gil_scoped_release release;
    attention_backward(sizes, heads(q), heads(k), heads(v), masked(mask), reinterpret_cast<const float*>(stats),
                       heads(grad_out), heads(grad_q), heads(grad_k), heads(grad_v));
  }, py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("stats"), py::arg("grad_out"),
     py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"));
}
