// What the bindings share: addresses, and a contraction with the arrays that it borrows.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "contraction.h"
#include "norm.h"

namespace sparseprop {

namespace py = pybind11;

using RowPtr = py::array_t<int64_t, py::array::c_style>;
using PackedBits = py::array_t<uint8_t, py::array::c_style>;
using ColIdx = py::array_t<int32_t, py::array::c_style>;
using PyNorm = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, double, double>;  // the fields of KnownNorm
using PyFinish = std::tuple<PyNorm, uintptr_t, Strides>;                               // and a residual

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

inline KnownNorm known_norm(const PyNorm& norm) {
  const auto& [mean, variance, gamma, beta, eps, cap] = norm;
  return {pointer(mean), pointer(variance), pointer(gamma), pointer(beta), eps, cap};
}

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

  Contraction& get() { return contraction_; }
  int64_t nnz() const { return contraction_.nnz(); }
  int64_t storage_bytes() const { return contraction_.storage_bytes(); }

  void forward(int dtype, int64_t batch, Triple in_size, Triple padding, Triple out_size, uintptr_t x, Strides x_strides,
               uintptr_t values, uintptr_t bias, uintptr_t out, Strides out_strides,
               const std::optional<PyFinish>& finish) {
    require_memory(x, "input");
    const py::gil_scoped_release release;
    const auto run = [&](const Finish* steps) {
      contraction_.forward(static_cast<DType>(dtype), {batch, in_size, padding, out_size}, {pointer(x), x_strides},
                           pointer(values), pointer(bias), {pointer(out), out_strides}, steps);
    };
    if (!finish) return run(nullptr);
    static_cast<DType>(dtype) == DType::float64 ? finished<double>(*finish, run) : finished<float>(*finish, run);
  }

  void backward(int dtype, int64_t batch, Triple in_size, Triple padding, Triple out_size, uintptr_t x,
                Strides x_strides, uintptr_t values, uintptr_t grad_out, Strides grad_out_strides, uintptr_t grad_in,
                Strides grad_in_strides, uintptr_t grad_values, uintptr_t grad_bias, uintptr_t added, Strides added_strides) {
    require_memory(grad_out, "gradient of the output");
    const py::gil_scoped_release release;
    contraction_.backward(static_cast<DType>(dtype), {batch, in_size, padding, out_size}, {pointer(x), x_strides},
                          pointer(values), {pointer(grad_out), grad_out_strides}, {pointer(grad_in), grad_in_strides},
                          {pointer(added), added_strides}, pointer(grad_values), pointer(grad_bias));
  }

 private:
  static void require_memory(uintptr_t address, const char* what) {
    if (address == 0) throw std::invalid_argument(std::string("the ") + what + " is empty or has no memory of its own; clone it.");
  }

  template <class S, class Run>
  void finished(const PyFinish& finish, Run run) {
    const auto& [norm, residual, strides] = finish;
    const KnownNorm known = known_norm(norm);
    const FoldedNorm<S> folded(known, contraction_.layer().out_channels);
    const Finish steps = {folded.scale.data(), folded.shift.data(), known.cap, {pointer(residual), strides}};
    run(&steps);
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

}  // namespace sparseprop
