// The contract of every kernel. Kernels know pointers only; nothing here allocates, checks or starts threads.
//
// One contraction serves every layer. A *column* is a position of the flattened grid (a batch entry, a pixel, or
// both). A *tile* is up to 8 * lanes adjacent columns whose accumulators stay in registers. A *panel* holds the
// rows that are reduced over, packed so that `panel + (offset << unit_log2)` is where a non-zero's columns start.
//
//   forward        out[row, tile]     = bias[row] + sum over non-zeros of  value * panel[offset(nz) + tile]
//   grad_input     the same on the transposed pattern
//   grad_values    dot[nz]            = <x[row, tile], panel[offset(nz) + tile]>, panel = grad_out
#pragma once
#include "contract.h"
#include "contract_around.h"

namespace sparseprop {

template <class S>
struct KernelsOf {
  // Index v - 1: a tile of v * lanes columns.
  void (*forward[kMaxTile])(const ForwardArgs<S>&);
  void (*backward[kMaxTile])(const BackwardArgs<S>&);
  void (*backward_rows[kMaxRowTile])(const BackwardRowsArgs<S>&);
  void (*bitmap_forward)(const BitmapArgs<S>&);
  void (*bitmap_backward)(const BitmapArgs<S>&);
  void (*gather)(const WeightTiles&, S* out, const S* values, ptrdiff_t nnz);
  void (*scatter)(const WeightTiles&, S* out, const S* dots, ptrdiff_t splits, ptrdiff_t nnz);
  void (*copy_runs)(const RunsArgs<S>&);
  ptrdiff_t vector;  // elements
  void (*zero)(S* dst, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t cols);
  void (*row_sums)(S* sums, const S* panel, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t cols);  // sums[r] +=
  Movers<S, S> move;
  NormKernels<S> planes, rows;
  void (*max_pool_row)(const PoolRow<S>&);
  void (*pad_plane)(const PaddingArgs<S>&);
  void (*depthwise)(const DepthwiseArgs<S>&);
  void (*depthwise_grad)(const DepthwiseGradArgs<S>&);
};

struct Kernels {
  const char* name;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  Movers<bf16, float> from_bf16;
  Movers<float, bf16> to_bf16;
  AttentionKernels attention;
  void (*gelu_backward)(const float* grad, const float* x, float* grad_x, ptrdiff_t n);
};

// Columns per lane group: one AVX-512 register. Every ISA uses the same tiles, so results do not depend on padding.
template <class S>
constexpr int lanes() {
  return 64 / static_cast<int>(sizeof(S));
}
extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

}  // namespace sparseprop
