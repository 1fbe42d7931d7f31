// Mask producers for Python: tensors come as addresses with element strides, checked here for shape only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "masks/producers.h"

namespace py = pybind11;

namespace sparseprop::masks {
namespace {

using Four = std::array<std::int64_t, 4>;

// The arguments every producer shares.
struct Request {
  int dtype;
  Four shape;
  int n;
  int m;
  bool dense_tail;
  std::uintptr_t scores;
  Four scores_strides;
  std::uintptr_t mask;
  Four mask_strides;
};

bool check(const Request& r) {
  if (r.dtype != 0 && r.dtype != 1) throw std::invalid_argument("scores must be float32 (0) or float64 (1)");
  if (r.m < 1 || r.m > kMaxTile) {
    throw std::invalid_argument("m must be from 1 to " + std::to_string(kMaxTile) + ", got " + std::to_string(r.m));
  }
  if (r.n < 1 || r.n > r.m) {
    throw std::invalid_argument("n must be from 1 to m = " + std::to_string(r.m) + ", got " + std::to_string(r.n));
  }
  bool empty = false;
  for (const std::int64_t size : r.shape) {
    if (size < 0) throw std::invalid_argument("negative size in shape");
    empty = empty || size == 0;
  }
  if (!empty && (r.scores == 0 || r.mask == 0)) throw std::invalid_argument("scores and mask must have an address");
  return !empty;
}

PlaneStrides strides(const Four& s) { return {s[0], s[1], s[2], s[3]}; }

template <typename Score>
Problem<Score> problem(const Request& r) {
  return {{r.shape[0], r.shape[1], r.shape[2], r.shape[3]},
          reinterpret_cast<const Score*>(r.scores),
          strides(r.scores_strides),
          reinterpret_cast<std::uint8_t*>(r.mask),
          strides(r.mask_strides),
          r.n,
          r.m,
          r.dense_tail};
}

void call_nm(int dtype, const Four& shape, int n, int m, bool dense_tail, std::uintptr_t scores,
             const Four& scores_strides, std::uintptr_t mask, const Four& mask_strides) {
  const Request r{dtype, shape, n, m, dense_tail, scores, scores_strides, mask, mask_strides};
  if (!check(r)) return;
  py::gil_scoped_release release;
  if (dtype == 0) {
    nm_mask(problem<float>(r));
  } else {
    nm_mask(problem<double>(r));
  }
}

Method parse_method(const std::string& name) {
  if (name == "exact") return Method::kExact;
  if (name == "greedy") return Method::kGreedy;
  if (name == "greedy_fill") return Method::kGreedyFill;
  throw std::invalid_argument("method must be exact, greedy or greedy_fill, got " + name);
}

void call_transposable(const std::string& method, bool at_most, int dtype, const Four& shape, int n, int m,
                       bool dense_tail, std::uintptr_t scores, const Four& scores_strides, std::uintptr_t mask,
                       const Four& mask_strides, std::uintptr_t row_dual, std::uintptr_t col_dual) {
  const Request r{dtype, shape, n, m, dense_tail, scores, scores_strides, mask, mask_strides};
  const TileOptions options{parse_method(method), at_most, reinterpret_cast<double*>(row_dual),
                            reinterpret_cast<double*>(col_dual)};
  if (!check(r)) return;
  if ((row_dual == 0) != (col_dual == 0)) throw std::invalid_argument("give both duals or neither");
  if (row_dual != 0 && (at_most || options.method != Method::kExact || shape[1] % m != 0 || shape[2] % m != 0)) {
    throw std::invalid_argument("duals exist for the exact method on whole tiles with exactly n kept");
  }
  py::gil_scoped_release release;
  if (dtype == 0) {
    transposable_nm_mask(problem<float>(r), options);
  } else {
    transposable_nm_mask(problem<double>(r), options);
  }
}

}  // namespace
}  // namespace sparseprop::masks

void bind_masks(py::module_& module) {
  using namespace py::literals;
  using namespace sparseprop::masks;
  module.def("nm_mask", &call_nm, "dtype"_a, "shape"_a, "n"_a, "m"_a, "dense_tail"_a, "scores"_a,
             "scores_strides"_a, "mask"_a, "mask_strides"_a);
  module.def("transposable_nm_mask", &call_transposable, "method"_a, "at_most"_a, "dtype"_a, "shape"_a, "n"_a,
             "m"_a, "dense_tail"_a, "scores"_a, "scores_strides"_a, "mask"_a, "mask_strides"_a, "row_dual"_a,
             "col_dual"_a);
}
