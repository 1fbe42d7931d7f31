// The gradient of GELU for Python: addresses of adjacent floats, checked by the caller.
#include <pybind11/pybind11.h>

#include "gelu.h"

namespace py = pybind11;

void bind_gelu(py::module_& m) {
  m.def("gelu_backward", [](uintptr_t grad, uintptr_t x, uintptr_t grad_x, int64_t n) {
    const py::gil_scoped_release release;
    sparseprop::gelu_backward(reinterpret_cast<const float*>(grad), reinterpret_cast<const float*>(x),
                              reinterpret_cast<float*>(grad_x), n);
  }, py::arg("grad"), py::arg("x"), py::arg("grad_x"), py::arg("n"));
}
