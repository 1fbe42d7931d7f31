// Both gradients of one tile from a single load of grad_out per non-zero: walking the pattern by input rows, the
// tile of x and the accumulators of grad_x stay in registers, and each non-zero's dot product is left as one vector
// in a ring until `width` of them can be summed together.
#pragma once
#include "../kernels.h"

namespace sparseprop {

template <class V>
class DotRing {
  using S = typename V::scalar;
  static constexpr int width = V::width;
  static constexpr uint32_t capacity = 64;

 public:
  static constexpr uint32_t piece = capacity - width;  // what fits whatever is pending

  DotRing(S* dots, bool accumulate) : dots_(dots), accumulate_(accumulate) {}

  inline void reserve(uint32_t n) {
    while (written_ + n > flushed_ + capacity) flush();
  }
  inline void push(V dot) {
    dot.store(ring_ + (written_ & (capacity - 1)) * width);
    ++written_;
  }
  void finish() {
    while (written_ - flushed_ >= width) flush();
    const S* rows = ring_ + (flushed_ & (capacity - 1)) * width;
    for (uint32_t i = 0; flushed_ + i < written_; ++i) {
      const S sum = V::load(rows + i * width).sum();
      dots_[flushed_ + i] = accumulate_ ? dots_[flushed_ + i] + sum : sum;
    }
  }

 private:
  inline void flush() {
    V sums = V::sum_rows(ring_ + (flushed_ & (capacity - 1)) * width);
    S* dst = dots_ + flushed_;
    if (accumulate_) sums = V::add(V::loadu(dst), sums);
    sums.storeu(dst);
    flushed_ += width;
  }

  alignas(64) S ring_[capacity * width];
  S* dots_;
  bool accumulate_;
  uint32_t written_ = 0;
  uint32_t flushed_ = 0;
};

template <class V, int vecs, bool want_x, bool want_dots>
struct Backward {
  using S = typename V::scalar;

  static void block(const BackwardArgs<S>& a, ptrdiff_t column, bool accumulate) {
    DotRing<V> ring(a.dots, accumulate);
    const uint16_t* offset = a.stream.offset;
    const S* panel = a.panel + column;
    size_t s = 0;
    for (size_t r = 0; r < a.stream.n_runs; ++r) {
      const Run run = a.stream.runs[r];
      for (uint32_t end = 0; end < run.rows; ++end, ++s, offset += run.count) {
        const ptrdiff_t at = a.stream.segment_row[s] * a.pitch + column;
        V x[vecs], grad_x[vecs];
        for (int i = 0; i < vecs; ++i) {
          if (want_dots) x[i] = V::load(a.x + at + i * V::width);
          if (want_x) grad_x[i] = run.first ? V::zero() : V::load(a.grad_x + at + i * V::width);
        }
        const S* values = a.values + a.stream.segment_value[s];
        for (uint32_t k = 0; k < run.count;) {
          const uint32_t left = run.count - k, n = left < DotRing<V>::piece ? left : DotRing<V>::piece;
          if (want_dots) ring.reserve(n);
          for (const uint32_t stop = k + n; k < stop; ++k) {
            const S* g = panel + (size_t(offset[k]) << a.unit_log2);
            const V value = V::broadcast(values[k]);
            V dot;
            for (int i = 0; i < vecs; ++i) {
              const V grad = V::loadu(g + i * V::width);
              if (want_x) grad_x[i] = V::fma(value, grad, grad_x[i]);
              if (want_dots) dot = i == 0 ? V::mul(x[0], grad) : V::fma(x[i], grad, dot);
            }
            if (want_dots) ring.push(dot);
          }
        }
        if (want_x)
          for (int i = 0; i < vecs; ++i) grad_x[i].store(a.grad_x + at + i * V::width);
      }
    }
    if (want_dots) ring.finish();
  }
};

// A tile of `vecs` vectors, cut so that x, grad_x and temporaries fit the registers (4 vectors at a time).
template <class V, int vecs>
void backward_tile(const BackwardArgs<typename V::scalar>& a) {
  constexpr int step = vecs % 4 == 0 ? 4 : vecs % 3 == 0 ? 3 : vecs < 4 ? vecs : 2;
  for (int i = 0; i < vecs; i += step) {
    const bool accumulate = a.accumulate || i > 0;
    const ptrdiff_t column = i * V::width;
    if (a.x && a.grad_x) {
      Backward<V, step, true, true>::block(a, column, accumulate);
    } else if (a.x) {
      Backward<V, step, false, true>::block(a, column, accumulate);
    } else {
      Backward<V, step, true, false>::block(a, column, accumulate);
    }
  }
}

}  // namespace sparseprop
