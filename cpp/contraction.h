// One layer's pattern, lowered on first use for the sizes it meets, and the three contractions run over threads.
#pragma once
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "exchange.h"
#include "packed.h"
#include "schedule.h"

namespace sparseprop {

struct RowBits;

enum class DType { float32 = 0, float64 = 1, bfloat16 = 2 };

struct TensorRef {
  void* data;
  Strides strides;
};

// What follows a forward contraction at once: x * scale + shift of each output channel (of the type of the values), the
// addition of a residual (or null, of the output's shape), an activation. cap: 0 none, infinity ReLU, 6 ReLU6.
struct Finish {
  const void *scale, *shift;
  double cap;
  TensorRef residual;
};

enum class Direction { forward, backward };

// A pattern ready for the kernels: one direction, one set of sizes.
struct Lowered {
  Direction direction;
  int64_t element_size;
  Sizes sizes;
  Grid padded;  // of the panel
  Grid grid;    // of the columns: the same, or without its halo
  Schedule schedule;
  bool by_rows;       // backward, on the forward pattern
  Stream stream;
  Exchange exchange;  // backward on the transposed pattern

  // Where a tensor like the input lies on the columns of a backward pass.
  Placement place_rows(const Layer& layer, const Strides& strides, const Triple& phase) const {
    return schedule.compact.used() ? place_output({sizes.batch, sizes.in, sizes.padding, sizes.in}, grid, strides)
                                   : place_input(layer, sizes, grid, strides, phase);
  }
};

class Contraction {
 public:
  // Borrows row_ptr (out_channels + 1) and col_idx (nnz); the owner keeps them alive. Throws std::invalid_argument
  // for indices that no pattern has; they are checked again whenever they are read.
  Contraction(const Layer& layer, const int64_t* row_ptr, const int32_t* col_idx, int64_t nnz);

  // Borrows the packed bits likewise, and unpacks them whenever it lowers: nothing else is kept.
  Contraction(const Layer& layer, const PackedNM& packed);

  int64_t nnz() const { return pattern_.nnz; }
  const Layer& layer() const { return layer_; }
  int64_t storage_bytes() const;

  // values, bias and their gradients are float64 for float64 activations, float32 otherwise; null = absent.
  // `finish`: not for bfloat16 (std::invalid_argument).
  void forward(DType dtype, const Sizes& sizes, TensorRef x, const void* values, const void* bias, TensorRef out,
               const Finish* finish = nullptr);
  // `added` to the input gradient, or null: what reaches the input on other ways.
  void backward(DType dtype, const Sizes& sizes, TensorRef x, const void* values, TensorRef grad_out, TensorRef grad_in,
                TensorRef added, void* grad_values, void* grad_bias);

 private:
  std::shared_ptr<const RowBits> row_bits();
  std::shared_ptr<const Lowered> lower(Direction direction, const Sizes& sizes, int64_t element_size, int64_t lanes);

  Layer layer_;
  PatternRef pattern_;  // of an N:M pattern nnz alone
  std::optional<PackedNM> packed_;
  mutable std::mutex mutex_;
  std::shared_ptr<const RowBits> bits_;
  std::vector<std::shared_ptr<const Lowered>> cache_;  // most recently used last
};

}  // namespace sparseprop
