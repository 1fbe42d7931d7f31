// Chains around a depthwise convolution for Python: contiguous tensors come as addresses, checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "chain.h"

namespace py = pybind11;

namespace sparseprop {
namespace {

// A batch norm and the activation behind it; addresses, 0 for what is absent.
struct Stage {
  bool training;
  double eps, cap, momentum;
  uintptr_t gamma, beta, mean, inv_std, running_mean, running_variance, grad_gamma, grad_beta;
};

template <class S>
S* pointer(uintptr_t address) { return reinterpret_cast<S*>(address); }

template <class S>
NormForward<S> forward_of(const Stage& s) {
  return {nullptr, nullptr, pointer<S>(s.gamma), pointer<S>(s.beta), pointer<S>(s.mean), pointer<S>(s.inv_std),
          nullptr, {pointer<S>(s.running_mean), pointer<S>(s.running_variance), s.momentum}, s.training, s.eps, nullptr, nullptr};
}

template <class S>
NormBackward<S> backward_of(const Stage& s) {
  return {nullptr, nullptr, nullptr, pointer<S>(s.gamma), pointer<S>(s.beta), pointer<S>(s.mean), pointer<S>(s.inv_std),
          nullptr, nullptr, pointer<S>(s.grad_gamma), pointer<S>(s.grad_beta), s.training, nullptr, nullptr};
}

using First = std::optional<Stage>;

template <class S>
void forward(const ChainShape& shape, uintptr_t x, const First& first, uintptr_t weights, const Stage& second, uintptr_t out) {
  const NormForward<S> before = forward_of<S>(first.value_or(Stage{})), behind = forward_of<S>(second);
  chain_forward<S>(shape, {first ? &before : nullptr, &behind, first ? first->cap : 0.0, second.cap, pointer<S>(x),
                           pointer<S>(weights), pointer<S>(out)});
}

template <class S>
void backward(const ChainShape& shape, uintptr_t x, const First& first, uintptr_t weights, const Stage& second,
              uintptr_t grad, uintptr_t grad_x, uintptr_t grad_weights) {
  const NormBackward<S> before = backward_of<S>(first.value_or(Stage{})), behind = backward_of<S>(second);
  chain_backward<S>(shape, {first ? &before : nullptr, &behind, first ? first->cap : 0.0, second.cap, pointer<S>(x),
                            pointer<S>(weights), pointer<S>(grad), pointer<S>(grad_x), pointer<S>(grad_weights)});
}

ChainShape shaped(const Windows& windows, int64_t channels) {
  if (channels < 1 || windows.planes % channels != 0) throw std::invalid_argument("a chain needs all channels of its images");
  return {windows.planes / channels, channels, windows};
}

}  // namespace
}  // namespace sparseprop

void bind_chain(py::module_& m) {
  using namespace sparseprop;
  py::class_<Stage>(m, "Stage")
      .def(py::init([](bool training, double eps, double cap, double momentum, uintptr_t gamma, uintptr_t beta,
                       uintptr_t mean, uintptr_t inv_std, uintptr_t running_mean, uintptr_t running_variance,
                       uintptr_t grad_gamma, uintptr_t grad_beta) {
             return Stage{training, eps,          cap,              momentum,   gamma,    beta, mean,
                          inv_std,  running_mean, running_variance, grad_gamma, grad_beta};
           }),
           py::arg("training"), py::arg("eps"), py::arg("cap"), py::arg("momentum"), py::arg("gamma"), py::arg("beta"),
           py::arg("mean"), py::arg("inv_std"), py::arg("running_mean"), py::arg("running_variance"), py::arg("grad_gamma"),
           py::arg("grad_beta"));
  m.def("chain_forward", [](bool wide, const Windows& windows, int64_t channels, uintptr_t x, const First& first,
                            uintptr_t weights, const Stage& second, uintptr_t out) {
    const ChainShape shape = shaped(windows, channels);
    const py::gil_scoped_release release;
    (wide ? forward<double> : forward<float>)(shape, x, first, weights, second, out);
  }, py::arg("wide"), py::arg("windows"), py::arg("channels"), py::arg("x"), py::arg("first"), py::arg("weights"),
        py::arg("second"), py::arg("out"));
  m.def("chain_backward", [](bool wide, const Windows& windows, int64_t channels, uintptr_t x, const First& first,
                             uintptr_t weights, const Stage& second, uintptr_t grad, uintptr_t grad_x, uintptr_t grad_weights) {
    const ChainShape shape = shaped(windows, channels);
    const py::gil_scoped_release release;
    (wide ? backward<double> : backward<float>)(shape, x, first, weights, second, grad, grad_x, grad_weights);
  }, py::arg("wide"), py::arg("windows"), py::arg("channels"), py::arg("x"), py::arg("first"), py::arg("weights"),
        py::arg("second"), py::arg("grad"), py::arg("grad_x"), py::arg("grad_weights"));
}
