// Batch norm for Python: contiguous tensors come as addresses, checked by the caller.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "norm.h"

namespace py = pybind11;

namespace sparseprop {
namespace {

template <class S>
S* pointer(uintptr_t address) { return reinterpret_cast<S*>(address); }

NormShape shaped(int64_t outer, int64_t channels, int64_t inner, double cap, const Windows* pool, uintptr_t residual) {
  if (outer < 1 || channels < 1 || inner < 1) throw std::invalid_argument("batch norm needs at least one element");
  if (pool && (pool->planes != outer * channels || pool->in_size() != inner || inner == 1 || residual))
    throw std::invalid_argument("batch norm before pooling: planes of the pooling's size, and no residual");
  return {outer, channels, inner, cap};
}

template <class S>
void forward(NormShape shape, bool training, double eps, uintptr_t x, uintptr_t residual, uintptr_t gamma,
             uintptr_t beta, uintptr_t mean, uintptr_t inv_std, uintptr_t out, uintptr_t running_mean,
             uintptr_t running_variance, double momentum, const Windows* pool, uintptr_t taps) {
  norm_forward<S>(shape, {pointer<S>(x), pointer<S>(residual), pointer<S>(gamma), pointer<S>(beta), pointer<S>(mean),
                          pointer<S>(inv_std), pointer<S>(out),
                          {pointer<S>(running_mean), pointer<S>(running_variance), momentum}, training, eps, pool,
                          pointer<uint8_t>(taps)});
}

template <class S>
void backward(NormShape shape, bool training, uintptr_t grad, uintptr_t x, uintptr_t out, uintptr_t gamma,
              uintptr_t beta, uintptr_t mean, uintptr_t inv_std, uintptr_t grad_x, uintptr_t grad_residual,
              uintptr_t grad_gamma, uintptr_t grad_beta, const Windows* pool, uintptr_t taps) {
  norm_backward<S>(shape, {pointer<S>(grad), pointer<S>(x), pointer<S>(out), pointer<S>(gamma), pointer<S>(beta),
                           pointer<S>(mean), pointer<S>(inv_std), pointer<S>(grad_x), pointer<S>(grad_residual),
                           pointer<S>(grad_gamma), pointer<S>(grad_beta), training, pool,
                           pointer<uint8_t>(taps)});
}

}  // namespace
}  // namespace sparseprop

void bind_norm(py::module_& m) {
  using namespace sparseprop;
  m.def("norm_forward", [](bool wide, int64_t outer, int64_t channels, int64_t inner, double cap, bool training,
                           double eps, uintptr_t x, uintptr_t residual, uintptr_t gamma, uintptr_t beta,
                           uintptr_t mean, uintptr_t inv_std, uintptr_t out, uintptr_t running_mean,
                           uintptr_t running_variance, double momentum, const Windows* pool, uintptr_t taps) {
    const NormShape shape = shaped(outer, channels, inner, cap, pool, residual);
    const py::gil_scoped_release release;
    (wide ? forward<double> : forward<float>)(shape, training, eps, x, residual, gamma, beta, mean, inv_std, out,
                                              running_mean, running_variance, momentum, pool, taps);
  },
      py::arg("wide"), py::arg("outer"), py::arg("channels"), py::arg("inner"), py::arg("cap"),
      py::arg("training"), py::arg("eps"), py::arg("x"), py::arg("residual"), py::arg("gamma"),
      py::arg("beta"), py::arg("mean"), py::arg("inv_std"), py::arg("out"), py::arg("running_mean"),
      py::arg("running_variance"), py::arg("momentum"), py::arg("pool"), py::arg("taps"));
  m.def("norm_backward", [](bool wide, int64_t outer, int64_t channels, int64_t inner, double cap, bool training,
                            uintptr_t grad, uintptr_t x, uintptr_t out, uintptr_t gamma, uintptr_t beta,
                            uintptr_t mean, uintptr_t inv_std, uintptr_t grad_x, uintptr_t grad_residual,
                            uintptr_t grad_gamma, uintptr_t grad_beta, const Windows* pool, uintptr_t taps) {
    const NormShape shape = shaped(outer, channels, inner, cap, pool, out);
    const py::gil_scoped_release release;
    (wide ? backward<double> : backward<float>)(shape, training, grad, x, out, gamma, beta, mean, inv_std, grad_x,
                                                grad_residual, grad_gamma, grad_beta, pool, taps);
  },
      py::arg("wide"), py::arg("outer"), py::arg("channels"), py::arg("inner"), py::arg("cap"),
      py::arg("training"), py::arg("grad"), py::arg("x"), py::arg("out"), py::arg("gamma"), py::arg("beta"),
      py::arg("mean"), py::arg("inv_std"), py::arg("grad_x"), py::arg("grad_residual"), py::arg("grad_gamma"),
      py::arg("grad_beta"), py::arg("pool"), py::arg("taps"));
}
