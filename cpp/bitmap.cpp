#include "bitmap.h"

#include <algorithm>

namespace sparseprop {
namespace {

constexpr int64_t kBatch = 8;       // at most
constexpr int64_t kWork = 1 << 16;  // weights of a share of the rows, at least
constexpr int64_t kShares = 8;      // at most
constexpr int64_t kSums = 4;        // shares with input gradients of their own, at most

// Both ways between tensors of any strides, (batch, channels), and rows of `pitch` elements.
template <class S, class A>
void load_rows(const Kernels& table, const TensorRef& tensor, int64_t batch, int64_t channels, S* rows, int64_t pitch) {
  movers<A, S>(table).copy(rows, {pitch, 1}, static_cast<const A*>(tensor.data), {tensor.strides[0], tensor.strides[1]}, batch,
                           channels);
  for (int64_t b = 0; b < batch; ++b) std::fill(rows + b * pitch + channels, rows + (b + 1) * pitch, S(0));
}

template <class S, class A>
void store_rows(const Kernels& table, const S* rows, int64_t pitch, int64_t batch, int64_t channels, const TensorRef& tensor) {
  movers<S, A>(table).copy(static_cast<A*>(tensor.data), {tensor.strides[0], tensor.strides[1]}, rows, {pitch, 1}, batch, channels);
}

template <class S>
BitmapArgs<S> arguments(const BitCall<S>& call, const S* values, int64_t lanes_of_vector) {
  BitmapArgs<S> a{};
  a.bits = call.pattern.bits.data();
  a.bits_pitch = call.pattern.pitch();
  a.start = call.pattern.start.data();
  a.nnz = call.pattern.start.back();
  a.windows = call.pattern.columns / lanes_of_vector;
  a.batch = call.batch;
  a.values = values;
  a.x_pitch = call.pattern.columns;
  a.out_pitch = call.layer.out_channels;
  return a;
}

// Shares of the rows for threads, whole vectors of them so that they do not write to the same lines; a number that depends
// on the problem alone.
int64_t shares_of(const Layer& layer, int64_t most) {
  return std::clamp<int64_t>(layer.out_channels * layer.in_channels / kWork, 1, most);
}

// run(i, arguments of share i).
template <class S, class Run>
void for_shares(const Layer& layer, int64_t shares, bool parallel, const BitmapArgs<S>& all, Run run) {
  const int64_t rows = layer.out_channels;
  run_each(shares, parallel && shares > 1, [&](int64_t i) {
    const Range groups = share(ceil_div(rows, 16), shares, i);
    BitmapArgs<S> mine = all;
    mine.first = std::min(groups.begin * 16, rows);
    mine.last = std::min(groups.end * 16, rows);
    run(i, mine);
  });
}

// Measured on Linear layers of 256 to 4096 features: work grows with the batch and not with the non-zeros. More than four
// batch entries walk a row's weights twice, which vectors of 8 are too slow for.
double least_density(Direction direction, int64_t batch, ptrdiff_t vector) {
  if (direction == Direction::backward) return 0.08 + 0.045 * double(batch);
  return batch <= 4 ? 0.2 : vector >= 16 ? 0.4 : 1.0;
}

}  // namespace

RowBits::RowBits(const Layer& layer, const PatternRef& pattern)
    : columns(ceil_div(layer.in_channels, 16) * 16), bits(layer.out_channels * columns / 8),
      start(pattern.row_ptr, pattern.row_ptr + layer.out_channels + 1) {
  for (int64_t r = 0; r < layer.out_channels; ++r) {
    uint8_t* row = bits.data() + r * pitch();
    for (int64_t k = start[r]; k < start[r + 1]; ++k) {
      const int32_t column = pattern.col_idx[k];
      row[column / 8] |= static_cast<uint8_t>(1u << column % 8);
    }
  }
}

bool goes_by_bits(const Layer& layer, const Sizes& sizes, int64_t nnz, Direction direction, ptrdiff_t vector) {
  const Triple one = {1, 1, 1};
  const double weights = double(layer.in_channels) * double(layer.out_channels);
  const bool linear = layer.taps() == 1 && layer.groups == 1 && layer.stride == one && sizes.in == one && sizes.out == one;
  return linear && sizes.batch > 0 && sizes.batch <= kBatch && weights > 0 &&
         double(nnz) >= least_density(direction, sizes.batch, vector) * weights;
}

template <class S, class A>
void bitmap_forward(const BitCall<S>& call, TensorRef x, const S* values, const S* bias, TensorRef out, bool parallel) {
  const int64_t rows = call.layer.out_channels, columns = call.pattern.columns, shares = shares_of(call.layer, kShares);
  Pieces pieces;
  const size_t x_at = pieces.add<S>(call.batch * columns), out_at = pieces.add<S>(call.batch * rows);
  const CallScratch scratch(pieces.bytes());
  const KernelsOf<S>& kernels = kernels_of<S>(call.table);
  BitmapArgs<S> a = arguments(call, values, kernels.vector);
  load_rows<S, A>(call.table, x, call.batch, call.layer.in_channels, at<S>(scratch.data, x_at), columns);
  a.x = at<S>(scratch.data, x_at);
  a.bias = bias;
  a.out = at<S>(scratch.data, out_at);
  for_shares(call.layer, shares, parallel, a, [&](int64_t, const BitmapArgs<S>& mine) { kernels.bitmap_forward(mine); });
  store_rows<S, A>(call.table, a.out, rows, call.batch, rows, out);
}

template <class S, class A>
void bitmap_backward(const BitCall<S>& call, TensorRef x, const S* values, TensorRef grad_out, const Gradients<S>& grads,
                     bool parallel) {
  const int64_t rows = call.layer.out_channels, channels = call.layer.in_channels, columns = call.pattern.columns;
  const int64_t shares = shares_of(call.layer, kSums), size = call.batch * columns;
  Pieces pieces;
  const size_t x_at = pieces.add<S>(grads.values ? size : 0), grad_at = pieces.add<S>(call.batch * rows),
               sums_at = pieces.add<S>(grads.in.data ? size * shares : 0);
  const CallScratch scratch(pieces.bytes());
  const KernelsOf<S>& kernels = kernels_of<S>(call.table);
  BitmapArgs<S> a = arguments(call, values, kernels.vector);
  if (grads.values) load_rows<S, A>(call.table, x, call.batch, channels, at<S>(scratch.data, x_at), columns);
  S* grad = at<S>(scratch.data, grad_at);
  load_rows<S, A>(call.table, grad_out, call.batch, rows, grad, rows);
  a.x = at<S>(scratch.data, x_at);
  a.grad_out = grad;
  a.dots = grads.values;
  S* sums = grads.in.data ? at<S>(scratch.data, sums_at) : nullptr;
  if (sums && grads.added.data) load_rows<S, A>(call.table, grads.added, call.batch, channels, sums, columns);
  if (sums || grads.values) {
    for_shares(call.layer, shares, parallel, a, [&](int64_t i, BitmapArgs<S>& mine) {
      if (sums) mine.grad_x = sums + i * size;
      if (sums && (i > 0 || !grads.added.data)) std::fill_n(mine.grad_x, size, S(0));
      kernels.bitmap_backward(mine);
    });
  }
  for (int64_t i = 1; sums && i < shares; ++i)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[i * size + k];
  if (sums) store_rows<S, A>(call.table, sums, columns, call.batch, channels, grads.in);
  for (int64_t o = 0; grads.bias && o < rows; ++o) {
    S sum = S(0);
    for (int64_t b = 0; b < call.batch; ++b) sum += grad[b * rows + o];
    grads.bias[o] = sum;
  }
}

#define SPARSEPROP_BITMAP(S, A)                                                                                      \
  template void bitmap_forward<S, A>(const BitCall<S>&, TensorRef, const S*, const S*, TensorRef, bool);             \
  template void bitmap_backward<S, A>(const BitCall<S>&, TensorRef, const S*, TensorRef, const Gradients<S>&, bool);
SPARSEPROP_BITMAP(float, float)
SPARSEPROP_BITMAP(double, double)
SPARSEPROP_BITMAP(float, bf16)
#undef SPARSEPROP_BITMAP

}  // namespace sparseprop
