// Pieces of attention on one head: dense products of panels that stay in the cache, and the softmax between them.
#pragma once
#include "../kernels.h"
#include "../simd/tile.h"

namespace sparseprop {

// `rows` x `vecs` sums in registers.
template <class V, int rows, int vecs>
struct Block {
  Block<V, rows - 1, vecs> head;
  Tile<V, vecs> last;

  static SPARSEPROP_INLINE Block load(const float* c, ptrdiff_t pitch) {
    return {Block<V, rows - 1, vecs>::load(c, pitch), Tile<V, vecs>::load(c + (rows - 1) * pitch)};
  }
  static SPARSEPROP_INLINE Block zero() { return {Block<V, rows - 1, vecs>::zero(), Tile<V, vecs>::fill(V::zero())}; }
  SPARSEPROP_INLINE void store(float* c, ptrdiff_t pitch) const {
    head.store(c, pitch);
    last.store(c + (rows - 1) * pitch);
  }
  SPARSEPROP_INLINE void add_products(const float* a, ptrdiff_t step, const Tile<V, vecs>& b) {
    head.add_products(a, step, b);
    last.add_product(V::broadcast(a[(rows - 1) * step]), b);
  }
};

template <class V, int vecs>
struct Block<V, 0, vecs> {
  static SPARSEPROP_INLINE Block load(const float*, ptrdiff_t) { return {}; }
  static SPARSEPROP_INLINE Block zero() { return {}; }
  SPARSEPROP_INLINE void store(float*, ptrdiff_t) const {}
  SPARSEPROP_INLINE void add_products(const float*, ptrdiff_t, const Tile<V, vecs>&) {}
};

constexpr int kProductRows = 6;

template <class V, int rows, int vecs, bool transposed>
void product_block(const ProductArgs& p, ptrdiff_t row, ptrdiff_t column) {
  using Sums = Block<V, rows, vecs>;
  const ptrdiff_t between_rows = transposed ? 1 : p.a_pitch, between_terms = transposed ? p.a_pitch : 1;
  const float *a = p.a + row * between_rows, *b = p.b + column;
  float* const c = p.c + row * p.c_pitch + column;
  Sums sums = p.accumulate ? Sums::load(c, p.c_pitch) : Sums::zero();
  for (ptrdiff_t k = 0; k < p.depth; ++k, a += between_terms, b += p.b_pitch) {
    sums.add_products(a, between_rows, Tile<V, vecs>::load(b));
  }
  sums.store(c, p.c_pitch);
}

// The columns of `vecs` vectors, all rows.
template <class V, int vecs, bool transposed>
void product_columns(const ProductArgs& p, ptrdiff_t column) {
  ptrdiff_t row = 0;
  for (; row + kProductRows <= p.rows; row += kProductRows) product_block<V, kProductRows, vecs, transposed>(p, row, column);
  for (; row + 2 <= p.rows; row += 2) product_block<V, 2, vecs, transposed>(p, row, column);
  if (row < p.rows) product_block<V, 1, vecs, transposed>(p, row, column);
}

template <class V, bool transposed>
void product_as(const ProductArgs& p) {
  constexpr int vecs = V::registers / 8, group = lanes<float>() / V::width;  // 6 * vecs sums, and what they come from
  constexpr ptrdiff_t wide = vecs * V::width, narrow = group * V::width;
  ptrdiff_t column = 0;
  for (; column + wide <= p.columns; column += wide) product_columns<V, vecs, transposed>(p, column);
  if constexpr (wide > narrow) {
    const ptrdiff_t left = (p.columns - column) / narrow;
    if (left == 1) product_columns<V, group, transposed>(p, column);
    if (left == 2) product_columns<V, 2 * group, transposed>(p, column);
    if (left == 3) product_columns<V, 3 * group, transposed>(p, column);
  }
}

template <class V>
void product(const ProductArgs& p) {
  p.transposed ? product_as<V, true>(p) : product_as<V, false>(p);
}

template <class V>
void scale_rows(const ScaleArgs& s) {
  constexpr ptrdiff_t ahead = 8;  // rows lie kilobytes apart, where the hardware prefetcher starts anew on each
  const float* src = s.src;
  float* dst = s.dst;
  for (ptrdiff_t r = 0; r < s.rows; ++r, src += s.src_pitch, dst += s.dst_pitch) {
    const V factor = V::broadcast(s.factor[r * s.factor_step]);
    const ptrdiff_t later = r + ahead < s.rows ? ahead * s.src_pitch : 0;
    for (ptrdiff_t i = 0; i < s.columns; i += lanes<float>()) {
      __builtin_prefetch(src + later + i);
      for (ptrdiff_t j = i; j < i + lanes<float>(); j += V::width) V::mul(V::loadu(src + j), factor).storeu(dst + j);
    }
  }
}

// e^x for x <= 1, by 8 terms of its series next to 0, within 2 units in the last place; 0 below -87.
template <class V>
SPARSEPROP_INLINE V exp_below_one(V x) {
  const V inside = V::max(V::broadcast(-87.f), x);
  const V n = V::round(V::mul(inside, V::broadcast(1.44269504f)));
  V r = V::fma(n, V::broadcast(-0.693359375f), inside);  // ln 2 in two parts: the first has bits to spare
  r = V::fma(n, V::broadcast(2.12194440e-4f), r);
  V sum = V::broadcast(1.f / 5040);
  sum = V::fma(sum, r, V::broadcast(1.f / 720));
  sum = V::fma(sum, r, V::broadcast(1.f / 120));
  sum = V::fma(sum, r, V::broadcast(1.f / 24));
  sum = V::fma(sum, r, V::broadcast(1.f / 6));
  sum = V::fma(sum, r, V::broadcast(.5f));
  sum = V::fma(sum, r, V::broadcast(1.f));
  sum = V::fma(sum, r, V::broadcast(1.f));
  return V::where_positive(V::add(x, V::broadcast(87.f)), V::times_power(sum, n));
}

template <class V>
struct Softmax {
  static constexpr ptrdiff_t w = V::width;
  static constexpr float kInfinity = __builtin_inff();

  static void forward(const ScoreRows& s) {
    float* row = s.scores;
    for (ptrdiff_t r = 0; r < s.rows; ++r, row += s.pitch) {
      V most = V::broadcast(-kInfinity);
      for (ptrdiff_t i = 0; i < s.columns; i += w) most = V::max(most, V::load(row + i));
      const float largest = most.largest(), shift = largest == -kInfinity ? 0 : largest;
      const V minus = V::broadcast(-shift);
      V sum = V::zero();
      for (ptrdiff_t i = 0; i < s.columns; i += w) {
        const V e = exp_below_one(V::add(V::load(row + i), minus));
        e.store(row + i);
        sum = V::add(sum, e);
      }
      const float total = sum.sum();
      s.factor[r] = total == 0 ? 0 : 1 / total;
      s.shift[r] = shift;
    }
  }

  static void backward(const ScoreRows& s) {
    float *row = s.scores, *grad = s.grads;
    for (ptrdiff_t r = 0; r < s.rows; ++r, row += s.pitch, grad += s.pitch) {
      const V minus = V::broadcast(-s.shift[r]), factor = V::broadcast(s.factor[r]);
      V sum = V::zero();
      for (ptrdiff_t i = 0; i < s.columns; i += w) {
        const V p = V::mul(exp_below_one(V::add(V::load(row + i), minus)), factor);
        p.store(row + i);
        sum = V::fma(p, V::load(grad + i), sum);
      }
      const V mean = V::broadcast(-sum.sum());
      for (ptrdiff_t i = 0; i < s.columns; i += w) V::mul(V::load(row + i), V::add(V::load(grad + i), mean)).store(grad + i);
    }
  }
};

}  // namespace sparseprop
