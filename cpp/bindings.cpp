// Python's view of the kernels: shapes and addresses are checked here, once; the GIL is released around the work.
#include "bindings.h"
#include "team.h"

using namespace sparseprop;

void bind_masks(py::module_& m);  // bindings_masks.cpp
void bind_norm(py::module_& m);   // bindings_norm.cpp
void bind_pool(py::module_& m);   // bindings_pool.cpp
void bind_chain(py::module_& m);  // bindings_chain.cpp
void bind_inverted(py::module_& m);   // bindings_inverted.cpp
void bind_attention(py::module_& m);  // bindings_attention.cpp
void bind_gelu(py::module_& m);       // bindings_gelu.cpp
void bind_watch(py::module_& m);      // bindings_watch.cpp

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
           py::arg("grad_values"), py::arg("grad_bias"), py::arg("added") = 0, py::arg("added_strides") = Strides{});
  bind_masks(m);
  bind_norm(m);
  bind_pool(m);
  bind_chain(m);
  bind_inverted(m);
  bind_attention(m);
  bind_gelu(m);
  bind_watch(m);
  on_each_thread([] {
    const py::gil_scoped_acquire gil;
    try {
      const py::dict modules = py::module_::import("sys").attr("modules");
      if (modules.contains("torch")) modules["torch"].attr("get_num_threads")();
    } catch (const py::error_already_set&) {  // then OpenMP's own number holds
    }
  });
  m.def("available_isas", [] { return py::tuple(py::cast(available_isas())); });
  m.def("active_isa", [] { return std::string(active_kernels().name); });
  m.def("amd_family", &amd_family);
  m.def("set_max_isa", &set_max_isa, py::arg("name"));
}
