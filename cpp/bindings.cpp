// Python's view of the kernels: shapes and addresses are checked here, once; the GIL is released around the work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "contraction.h"

namespace py = pybind11;
using namespace sparseprop;

namespace {

using RowPtr = py::array_t<int64_t, py::array::c_style>;
using PackedBits = py::array_t<uint8_t, py::array::c_style>;
using ColIdx = py::array_t<int32_t, py::array::c_style>;
// mean, variance, gamma, beta, eps, cap, residual and its strides
using PyFinish = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, double, double, uintptr_t, Strides>;

class PyContraction {
 public:
  PyContraction(int64_t out_channels, int64_t in_channels, int64_t groups, Triple kernel, Triple stride, Triple dilation,
                RowPtr row_ptr, ColIdx col_idx)
      : row_ptr_(std::move(row_ptr)),
        col_idx_(std::move(col_idx)),
        contraction_(check_rows({out_channels, in_channels, groups, kernel, stride, dilation}), row_ptr_.data(),
                     col_idx_.data(), col_idx_.size()) {}
  PyContraction(const Layer& layer, int64_t kept, int64_t of, PackedBits bits)
      : packed_(std::move(bits)), contraction_(check(layer), check_bits(layer, kept, of)) {}

  int64_t nnz() const { return contraction_.nnz(); }
  int64_t storage_bytes() const { return contraction_.storage_bytes(); }

  void forward(int dtype, int64_t batch, Triple in_size, Triple padding, Triple out_size, uintptr_t x, Strides x_strides,
               uintptr_t values, uintptr_t bias, uintptr_t out, Strides out_strides,
               const std::optional<PyFinish>& finish) {
    const py::gil_scoped_release release;
    std::optional<Finish> steps;
    if (finish) steps = std::apply(finish_of, *finish);
    contraction_.forward(static_cast<DType>(dtype), {batch, in_size, padding, out_size}, {pointer(x), x_strides},
                         pointer(values), pointer(bias), {pointer(out), out_strides}, steps ? &*steps : nullptr);
  }

  void backward(int dtype, int64_t batch, Triple in_size, Triple padding, Triple out_size, uintptr_t x,
                Strides x_strides, uintptr_t values, uintptr_t grad_out, Strides grad_out_strides, uintptr_t grad_in,
                Strides grad_in_strides, uintptr_t grad_values, uintptr_t grad_bias) {
    const py::gil_scoped_release release;
    contraction_.backward(static_cast<DType>(dtype), {batch, in_size, padding, out_size}, {pointer(x), x_strides},
                          pointer(values), {pointer(grad_out), grad_out_strides}, {pointer(grad_in), grad_in_strides},
                          pointer(grad_values), pointer(grad_bias));
  }

 private:
  static void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

  static Finish finish_of(uintptr_t mean, uintptr_t variance, uintptr_t gamma, uintptr_t beta, double eps, double cap,
                          uintptr_t residual, const Strides& strides) {
    return {pointer(mean), pointer(variance), pointer(gamma), pointer(beta), eps, cap, {pointer(residual), strides}};
  }

  static Layer check(const Layer& layer) {
    for (int d = 0; d < 3; ++d) {
      if (layer.kernel[d] < 1 || layer.stride[d] < 1 || layer.dilation[d] < 1) {
        throw std::invalid_argument("kernel, stride and dilation must be at least 1 in every dimension.");
      }
    }
    if (layer.groups < 1 || layer.out_channels < 0 || layer.in_channels < 0 || layer.in_channels % layer.groups != 0 ||
        layer.out_channels % layer.groups != 0) {
      throw std::invalid_argument("groups must divide in_channels and out_channels.");
    }
    return layer;
  }

  PackedNM check_bits(const Layer& layer, int64_t kept, int64_t of) const {
    if (packed_.ndim() != 2 || packed_.shape(0) != layer.out_channels) {
      throw std::invalid_argument("packed bits must be a matrix of out_channels = " + std::to_string(layer.out_channels) + " rows.");
    }
    return {kept, of, packed_.shape(1), packed_.data()};
  }

  Layer check_rows(const Layer& layer) const {
    check(layer);
    if (row_ptr_.size() != layer.out_channels + 1) {
      throw std::invalid_argument("row_ptr has " + std::to_string(row_ptr_.size()) + " entries, wanted out_channels + 1 = " +
                                  std::to_string(layer.out_channels + 1) + ".");
    }
    return layer;
  }

  PackedBits packed_;
  RowPtr row_ptr_;
  ColIdx col_idx_;
  Contraction contraction_;
};

}  // namespace

void bind_masks(py::module_& m);  // bindings_masks.cpp
void bind_norm(py::module_& m);   // bindings_norm.cpp
void bind_pool(py::module_& m);   // bindings_pool.cpp
void bind_chain(py::module_& m);  // bindings_chain.cpp
void bind_attention(py::module_& m);  // bindings_attention.cpp
void bind_gelu(py::module_& m);       // bindings_gelu.cpp

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Kernels for sparse weights; use sparseprop.nn, not this module.";
  py::class_<PyContraction>(m, "Contraction")
      .def(py::init<int64_t, int64_t, int64_t, Triple, Triple, Triple, RowPtr, ColIdx>(), py::arg("out_channels"),
           py::arg("in_channels"), py::arg("groups"), py::arg("kernel"), py::arg("stride"), py::arg("dilation"),
           py::arg("row_ptr").noconvert(), py::arg("col_idx").noconvert())
      .def_static(
          "from_nm",
          [](int64_t out_channels, int64_t in_channels, int64_t groups, Triple kernel, Triple stride, Triple dilation,
             int64_t kept, int64_t of, PackedBits bits) {
            const Layer layer{out_channels, in_channels, groups, kernel, stride, dilation};
            return std::make_unique<PyContraction>(layer, kept, of, std::move(bits));
          },
          py::arg("out_channels"), py::arg("in_channels"), py::arg("groups"), py::arg("kernel"), py::arg("stride"),
          py::arg("dilation"), py::arg("kept"), py::arg("of"), py::arg("bits").noconvert())
      .def_property_readonly("nnz", &PyContraction::nnz)
      .def_property_readonly("storage_bytes", &PyContraction::storage_bytes)
      .def("forward", &PyContraction::forward, py::arg("dtype"), py::arg("batch"), py::arg("in_size"),
           py::arg("padding"), py::arg("out_size"), py::arg("x"), py::arg("x_strides"), py::arg("values"),
           py::arg("bias"), py::arg("out"), py::arg("out_strides"), py::arg("finish") = py::none())
      .def("backward", &PyContraction::backward, py::arg("dtype"), py::arg("batch"), py::arg("in_size"),
           py::arg("padding"), py::arg("out_size"), py::arg("x"), py::arg("x_strides"), py::arg("values"),
           py::arg("grad_out"), py::arg("grad_out_strides"), py::arg("grad_in"), py::arg("grad_in_strides"),
           py::arg("grad_values"), py::arg("grad_bias"));
  bind_masks(m);
  bind_norm(m);
  bind_pool(m);
  bind_chain(m);
  bind_attention(m);
  bind_gelu(m);
  m.def("available_isas", [] { return py::tuple(py::cast(available_isas())); });
  m.def("active_isa", [] { return std::string(active_kernels().name); });
  m.def("made_by_amd", &made_by_amd);
  m.def("set_max_isa", &set_max_isa, py::arg("name"));
}
