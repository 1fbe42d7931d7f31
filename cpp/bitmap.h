// Linear layers on few batch entries, by a bitmap of the pattern: one for every batch and both directions.
#pragma once
#include <cstdint>
#include <vector>

#include "entries.h"
#include "run.h"

namespace sparseprop {

// The pattern of a weight as bits, rows padded to whole vectors, and where each row's values begin.
struct RowBits {
  int64_t columns;  // padded
  std::vector<uint8_t> bits;
  std::vector<int64_t> start;  // rows + 1

  RowBits(const Layer& layer, const PatternRef& pattern);
  int64_t pitch() const { return columns / 8; }
  int64_t storage_bytes() const { return static_cast<int64_t>(bits.size() + start.size() * 8); }
};

// Whether such a layer on this input is faster by bits, with vectors of so many elements.
bool goes_by_bits(const Layer& layer, const Sizes& sizes, int64_t nnz, Direction direction, ptrdiff_t vector);

template <class S>
struct BitCall {
  const Layer& layer;
  const RowBits& pattern;
  int64_t batch;
  const Kernels& table;
};

// Element type A of the activations, S of values, bias and sums.
template <class S, class A>
void bitmap_forward(const BitCall<S>& call, TensorRef x, const S* values, const S* bias, TensorRef out, bool parallel);
template <class S, class A>
void bitmap_backward(const BitCall<S>& call, TensorRef x, const S* values, TensorRef grad_out, const Gradients<S>& grads,
                     bool parallel);

}  // namespace sparseprop
