// Max pooling for Python: contiguous planes come as addresses, checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "dispatch.h"

namespace py = pybind11;

namespace sparseprop {
namespace {

using Pair = std::array<int64_t, 2>;  // height, width

struct Pool {
  int64_t planes;
  Pair in, out, kernel, stride, padding;
};

template <class S>
void max_pool(const Pool& p, const S* x, S* out, int64_t* index) {
  const auto kernel = kernels_of<S>(active_kernels()).max_pool_row;
#pragma omp parallel for schedule(static) if (p.planes * p.in[0] * p.in[1] > (1 << 15))
  for (int64_t plane = 0; plane < p.planes; ++plane) {
    for (int64_t h = 0; h < p.out[0]; ++h) {
      const int64_t start = h * p.stride[0] - p.padding[0], first = std::max<int64_t>(start, 0);
      const int64_t rows = std::min(start + p.kernel[0], p.in[0]) - first, to = (plane * p.out[0] + h) * p.out[1];
      kernel({x + plane * p.in[0] * p.in[1], p.in[1], first, rows, p.kernel[1], p.stride[1], p.padding[1], p.out[1],
              out + to, index + to});
    }
  }
}

}  // namespace
}  // namespace sparseprop

void bind_pool(py::module_& m) {
  using namespace sparseprop;
  m.def(
      "max_pool2d",
      [](bool wide, int64_t planes, Pair in, Pair out, Pair kernel, Pair stride, Pair padding, uintptr_t x, uintptr_t values, uintptr_t index) {
        const Pool pool = {planes, in, out, kernel, stride, padding};
        const py::gil_scoped_release release;
        auto* at = reinterpret_cast<int64_t*>(index);
        if (wide) {
          max_pool(pool, reinterpret_cast<const double*>(x), reinterpret_cast<double*>(values), at);
        } else {
          max_pool(pool, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(values), at);
        }
      },
      py::arg("wide"), py::arg("planes"), py::arg("in_size"), py::arg("out_size"), py::arg("kernel"), py::arg("stride"),
      py::arg("padding"), py::arg("x"), py::arg("values"), py::arg("index"));
}
