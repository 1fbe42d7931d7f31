// Windows, and the max pooling of what is in them, for Python: contiguous planes come as addresses, checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "pool.h"

namespace py = pybind11;

namespace sparseprop {
namespace {

template <class S>
S* pointer(uintptr_t address) { return reinterpret_cast<S*>(address); }

template <class S>
void forward(const Windows& pool, uintptr_t x, uintptr_t values, uintptr_t taps) {
  max_pool(pool, pointer<S>(x), pointer<S>(values), pointer<uint8_t>(taps));
}

template <class S>
void backward(const Windows& pool, uintptr_t grad, uintptr_t taps, uintptr_t grad_x) {
  max_pool_backward(pool, pointer<S>(grad), pointer<uint8_t>(taps), pointer<S>(grad_x));
}

// Refuses what would lead outside the planes, or to windows that hold nothing.
Windows checked(int64_t planes, Pair in, Pair out, Pair kernel, Pair stride, Pair padding) {
  for (int d = 0; d < 2; ++d) {
    const bool sizes = in[d] > 0 && out[d] > 0 && kernel[d] > 0 && stride[d] > 0 && padding[d] >= 0;
    if (!sizes || 2 * padding[d] > kernel[d] || (out[d] - 1) * stride[d] + kernel[d] > in[d] + 2 * padding[d])
      throw std::invalid_argument("windows do not fit the planes");
  }
  if (kernel[0] * kernel[1] > 255) throw std::invalid_argument("windows must have at most 255 elements");
  return {planes, in, out, kernel, stride, padding};
}

}  // namespace
}  // namespace sparseprop

void bind_pool(py::module_& m) {
  using namespace sparseprop;
  py::class_<Windows>(m, "Windows")
      .def(py::init(&checked), py::arg("planes"), py::arg("in_size"), py::arg("out_size"), py::arg("kernel"),
           py::arg("stride"), py::arg("padding"));
  m.def("max_pool2d", [](bool wide, const Windows& pool, uintptr_t x, uintptr_t values, uintptr_t taps) {
    const py::gil_scoped_release release;
    (wide ? forward<double> : forward<float>)(pool, x, values, taps);
  }, py::arg("wide"), py::arg("pool"), py::arg("x"), py::arg("values"), py::arg("taps"));
  m.def("max_pool2d_backward", [](bool wide, const Windows& pool, uintptr_t grad, uintptr_t taps, uintptr_t grad_x) {
    const py::gil_scoped_release release;
    (wide ? backward<double> : backward<float>)(pool, grad, taps, grad_x);
  }, py::arg("wide"), py::arg("pool"), py::arg("grad"), py::arg("taps"), py::arg("grad_x"));
}
