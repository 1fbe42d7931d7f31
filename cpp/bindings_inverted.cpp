// Inverted residual blocks for Python: contiguous tensors come as addresses, checked by the caller.
#include "bindings.h"
#include "inverted.h"

namespace sparseprop {
namespace {

// layer, sizes of an image (in, padding, out), values, bias, batch norm
using PyStep = std::tuple<PyContraction*, std::tuple<Triple, Triple, Triple>, uintptr_t, uintptr_t, PyNorm>;

SparseStep step_of(const PyStep& step) {
  const auto& [layer, sizes, values, bias, norm] = step;
  const auto& [in, padding, out] = sizes;
  return {layer->get(), {1, in, padding, out}, pointer(values), pointer(bias), known_norm(norm)};
}

void forward(uintptr_t x, uintptr_t out, bool wide, int64_t images, const std::optional<PyStep>& expand, const Windows& windows, int64_t channels,
             uintptr_t weights, const PyNorm& norm, const PyStep& project) {
  const py::gil_scoped_release release;
  std::optional<SparseStep> first;
  if (expand) first.emplace(step_of(*expand));
  const InvertedBlock block = {images, first ? &*first : nullptr, windows, channels, pointer(weights), known_norm(norm),
                               step_of(project), pointer(x), pointer(out)};
  wide ? run_block<double>(block) : run_block<float>(block);
}

}  // namespace
}  // namespace sparseprop

void bind_inverted(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("inverted_forward", &sparseprop::forward, py::arg("x"), py::arg("out"), py::arg("wide"), py::arg("images"), py::arg("expand"),
        py::arg("windows"), py::arg("channels"), py::arg("weights"), py::arg("norm"), py::arg("project"));
}
