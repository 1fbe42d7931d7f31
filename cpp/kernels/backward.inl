// Both gradients of one tile from a single load of grad_out per non-zero: walking the pattern by input rows, the
// tile of x and the accumulators of grad_x stay in registers, and each non-zero's dot product is left as one vector
// in a ring until `width` of them can be summed together. Limit on Cascade Lake at 90 %: 5.2 ns per non-zero and 64
// columns, of them 2.3 on the FMA and shuffle ports (counted); the rest is the segment's x and grad_x lines and the dot reduction. Segments
// of 6, 8, 12, 16, 25 and 50 non-zeros, tiles of 64 and 128 columns, parts of 64 to 512 KiB: all within 5 %.
#pragma once
#include "../kernels.h"

namespace sparseprop {

// Dot products of consecutive non-zeros, one vector each, on their way to `dots`. The counters are plain locals of
// the kernel: as members beside the ring they would live in memory, 5 cycles a non-zero.
template <class V>
struct DotRing {
  using S = typename V::scalar;
  static constexpr uint32_t width = V::width;
  static constexpr uint32_t capacity = 64;
  static constexpr uint32_t piece = capacity - width;  // what fits whatever is pending

  static inline S* slot(S* ring, uint32_t index) { return ring + (index & (capacity - 1)) * width; }

  // Sums whole groups of `width` until `incoming` more fit.
  static inline uint32_t make_room(S* ring, uint32_t flushed, uint32_t written, uint32_t incoming, S* dots, bool accumulate) {
    for (; written + incoming > flushed + capacity; flushed += width) {
      V sums = V::sum_rows(slot(ring, flushed));
      if (accumulate) sums = V::add(V::loadu(dots + flushed), sums);
      sums.storeu(dots + flushed);
    }
    return flushed;
  }

  static void finish(S* ring, uint32_t flushed, uint32_t written, S* dots, bool accumulate) {
    for (; flushed < written; ++flushed) {
      const S sum = V::load(slot(ring, flushed)).sum();
      dots[flushed] = accumulate ? dots[flushed] + sum : sum;
    }
  }
};

template <class V, int vecs, bool want_x, bool want_dots, bool scaled>
struct Backward {
  using S = typename V::scalar;
  using Ring = DotRing<V>;

  // One non-zero: grad_x += value * grad, and <x, grad> lane by lane, in two chains.
  static inline V both(V (&grad_x)[vecs], const V (&x)[vecs], V value, const S* g) {
    asm("" : "+r"(g));
    V dot[2] = {V::zero(), V::zero()};
    for (int i = 0; i < vecs; ++i) {
      const V grad = V::in_register(V::loadu(g + i * V::width));
      if (want_x) grad_x[i] = V::fma(value, grad, grad_x[i]);
      if (want_dots) dot[i % 2] = i < 2 ? V::mul(x[i], grad) : V::fma(x[i], grad, dot[i % 2]);
    }
    return vecs > 1 ? V::add(dot[0], dot[1]) : dot[0];
  }

  static void block(const BackwardArgs<S>& a, ptrdiff_t column, bool accumulate) {
    alignas(64) S ring[Ring::capacity * Ring::width];
    uint32_t written = 0, flushed = 0;
    S* const dots = a.dots;
    const uint16_t* offset = a.stream.offset;
    const S* const panel = a.panel + column;
    const unsigned unit_log2 = a.unit_log2;
    size_t s = 0;
    for (size_t r = 0; r < a.stream.n_runs; ++r) {
      const Run run = a.stream.runs[r];
      for (uint32_t end = 0; end < run.rows; ++end, ++s, offset += run.count) {
        const ptrdiff_t at = a.stream.segment_row[s] * a.pitch + column;
        V x[vecs], grad_x[vecs];
        for (int i = 0; i < vecs; ++i) {
          x[i] = want_dots ? V::load(a.x + at + i * V::width) : V::zero();
          grad_x[i] = !want_x || run.first ? V::zero() : V::load(a.grad_x + at + i * V::width);
        }
        const S* values = a.values + a.stream.segment_value[s];
        for (uint32_t k = 0; k < run.count;) {
          const uint32_t left = run.count - k, n = left < Ring::piece ? left : Ring::piece;
          if (want_dots) flushed = Ring::make_room(ring, flushed, written, n, dots, accumulate);
          for (const uint32_t stop = k + n; k < stop; ++k, ++written) {
            const V value = want_x ? V::broadcast(values[k]) : V::zero();
            const V dot = both(grad_x, x, value, panel + (scaled ? size_t(offset[k]) << unit_log2 : size_t(offset[k])));
            if (want_dots) dot.store(Ring::slot(ring, written));
          }
        }
        if (want_x)
          for (int i = 0; i < vecs; ++i) grad_x[i].store(a.grad_x + at + i * V::width);
      }
    }
    if (want_dots) {
      flushed = Ring::make_room(ring, flushed, written, Ring::piece + 1, dots, accumulate);
      Ring::finish(ring, flushed, written, dots, accumulate);
    }
  }
};

template <class V, int vecs, bool want_x, bool want_dots>
void backward_pass(const BackwardArgs<typename V::scalar>& a, int first) {
  const ptrdiff_t column = first * V::width;
  const bool accumulate = a.accumulate || first > 0;
  if (a.unit_log2 == 0) {
    Backward<V, vecs, want_x, want_dots, false>::block(a, column, accumulate);
  } else {
    Backward<V, vecs, want_x, want_dots, true>::block(a, column, accumulate);
  }
}

template <class V, int vecs>
void backward_pass(const BackwardArgs<typename V::scalar>& a, int first) {
  if (a.x && a.grad_x) {
    backward_pass<V, vecs, true, true>(a, first);
  } else if (a.x) {
    backward_pass<V, vecs, false, true>(a, first);
  } else {
    backward_pass<V, vecs, true, false>(a, first);
  }
}

// A tile of `vecs` vectors in passes whose x, grad_x and temporaries fit the registers.
template <class V, int vecs>
void backward_tile(const BackwardArgs<typename V::scalar>& a) {
  constexpr int most = V::registers / 4, full = vecs / most * most;
  for (int i = 0; i < full; i += most) backward_pass<V, most>(a, i);
  if constexpr (vecs > full) backward_pass<V, vecs - full>(a, full);
}

}  // namespace sparseprop
