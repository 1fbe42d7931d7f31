// Max pooling for Python: contiguous planes come as addresses, checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "pool.h"

namespace py = pybind11;

namespace sparseprop {
namespace {

template <class S>
void pooled(const Pool& pool, uintptr_t x, uintptr_t values, uintptr_t index) {
  const py::gil_scoped_release release;
  max_pool(pool, reinterpret_cast<const S*>(x), reinterpret_cast<S*>(values), reinterpret_cast<int64_t*>(index));
}

}  // namespace
}  // namespace sparseprop

void bind_pool(py::module_& m) {
  using namespace sparseprop;
  m.def(
      "max_pool2d",
      [](bool wide, int64_t planes, Pair in, Pair out, Pair kernel, Pair stride, Pair padding, uintptr_t x,
         uintptr_t values, uintptr_t index) {
        (wide ? pooled<double> : pooled<float>)({planes, in, out, kernel, stride, padding}, x, values, index);
      },
      py::arg("wide"), py::arg("planes"), py::arg("in_size"), py::arg("out_size"), py::arg("kernel"), py::arg("stride"),
      py::arg("padding"), py::arg("x"), py::arg("values"), py::arg("index"));
}
