// Few batch entries and many non-zeros: weights are unfolded by a row's bitmap where they are used, a vector at a time, and
// multiplied with adjacent inputs; weight gradients are folded in the same way. Some lanes idle, which still costs less than an
// index for each non-zero whose few columns hardly fill a vector.
#pragma once
#include "../simd/tile.h"

namespace sparseprop {

template <int i>
struct Number {
  static constexpr int value = i;
};

// body(Number<0>), ..., body(Number<n - 1>).
template <int n, int i = 0, class Body>
SPARSEPROP_INLINE void each(Body&& body) {
  if constexpr (i < n) {
    body(Number<i>{});
    each<n, i + 1>(body);
  }
}

template <class V>
struct Bitmap {
  using S = typename V::scalar;
  using Args = BitmapArgs<S>;
  static constexpr int most = 4;  // rows, and batch entries, that share what is loaded

  // One row's bits and values, window by window.
  struct Row {
    const uint8_t* bits;
    ptrdiff_t value, end;  // positions of the next value and behind the row's last one
    unsigned bits_here;
    typename V::Lanes lanes;

    SPARSEPROP_INLINE void start(const Args& a, ptrdiff_t row) {
      bits = a.bits + row * a.bits_pitch;
      value = a.start[row];
      end = a.start[row + 1];
    }
    SPARSEPROP_INLINE void look_at(ptrdiff_t window) {
      if constexpr (V::width == 16) {
        bits_here = static_cast<unsigned>(bits[2 * window] | bits[2 * window + 1] << 8);
      } else if constexpr (V::width == 8) {
        bits_here = bits[window];
      } else {
        bits_here = bits[window / 2] >> (window % 2 * 4) & 15;
      }
      lanes = V::lanes(bits_here);
    }
    SPARSEPROP_INLINE V weights(const Args& a) const {
      const S* from = a.values + value;
      return V::expand(a.nnz - value >= V::width ? V::loadu(from) : V::load_some(from, a.nnz - value), bits_here);
    }
    // What lies behind the window's own, in the same row, is written before it is.
    SPARSEPROP_INLINE void store(const Args& a, V sums) const {
      const V folded = V::compress(sums, bits_here);
      end - value >= V::width ? folded.storeu(a.dots + value) : folded.store_some(a.dots + value, end - value);
    }
    SPARSEPROP_INLINE void move_on() { value += __builtin_popcount(bits_here); }
  };

  template <int rows>
  static SPARSEPROP_INLINE void start(Row (&r)[rows], const Args& a, ptrdiff_t row) {
    each<rows>([&](auto i) __attribute__((always_inline)) { r[i.value].start(a, row + i.value); });
  }

  template <int rows, int batch>
  static void forward_pass(const Args& a, ptrdiff_t row, ptrdiff_t first) {
    using Sums = Tile<V, rows * batch>;
    Sums sums = Sums::fill(V::zero());
    Row r[rows];
    start(r, a, row);
    for (ptrdiff_t w = 0; w < a.windows; ++w) {
      Tile<V, rows> weights;
      each<rows>([&](auto i) __attribute__((always_inline)) {
        r[i.value].look_at(w);
        weights.template get<i.value>() = r[i.value].weights(a);
        r[i.value].move_on();
      });
      each<batch>([&](auto b) __attribute__((always_inline)) {
        const V x = V::load(a.x + (first + b.value) * a.x_pitch + w * V::width);
        each<rows>([&](auto i) __attribute__((always_inline)) {
          V& sum = sums.template get<i.value * batch + b.value>();
          sum = V::fma_in(r[i.value].lanes, weights.template get<i.value>(), x, sum);
        });
      });
    }
    each<rows>([&](auto i) __attribute__((always_inline)) {
      const S bias = a.bias ? a.bias[row + i.value] : S(0);
      each<batch>([&](auto b) __attribute__((always_inline)) {
        a.out[(first + b.value) * a.out_pitch + row + i.value] = bias + sums.template get<i.value * batch + b.value>().sum();
      });
    });
  }

  template <int rows>
  static void forward_rows(const Args& a, ptrdiff_t row) {
    ptrdiff_t b = 0;
    for (; b + most <= a.batch; b += most) forward_pass<rows, most>(a, row, b);
    if (a.batch % most == 3) forward_pass<rows, 3>(a, row, b);
    if (a.batch % most == 2) forward_pass<rows, 2>(a, row, b);
    if (a.batch % most == 1) forward_pass<rows, 1>(a, row, b);
  }

  static void forward(const Args& a) {
    ptrdiff_t row = a.first;
    for (; row + most <= a.last; row += most) forward_rows<most>(a, row);
    for (; row < a.last; ++row) forward_rows<1>(a, row);
  }

  template <int rows, bool want_x, bool want_dots>
  static void backward_rows(const Args& a, ptrdiff_t row) {
    using Rows = Tile<V, rows>;
    Row r[rows];
    start(r, a, row);
    for (ptrdiff_t w = 0; w < a.windows; ++w) {
      Rows weights = Rows::fill(V::zero()), dots = weights;
      each<rows>([&](auto i) __attribute__((always_inline)) {
        r[i.value].look_at(w);
        if constexpr (want_x) weights.template get<i.value>() = r[i.value].weights(a);
      });
      for (ptrdiff_t b = 0; b < a.batch; ++b) {
        const S* grad = a.grad_out + b * a.out_pitch + row;
        S* grad_x = a.grad_x + b * a.x_pitch + w * V::width;
        V x = V::zero(), sum = V::zero();
        if constexpr (want_dots) x = V::load(a.x + b * a.x_pitch + w * V::width);
        if constexpr (want_x) sum = V::load(grad_x);
        each<rows>([&](auto i) __attribute__((always_inline)) {
          const V g = V::broadcast(grad[i.value]);
          if constexpr (want_dots) dots.template get<i.value>() = V::fma(g, x, dots.template get<i.value>());
          if constexpr (want_x) sum = V::fma_in(r[i.value].lanes, weights.template get<i.value>(), g, sum);
        });
        if constexpr (want_x) sum.store(grad_x);
      }
      each<rows>([&](auto i) __attribute__((always_inline)) {
        if constexpr (want_dots) r[i.value].store(a, dots.template get<i.value>());
        r[i.value].move_on();
      });
    }
  }

  template <bool want_x, bool want_dots>
  static void backward_all(const Args& a) {
    ptrdiff_t row = a.first;
    for (; row + most <= a.last; row += most) backward_rows<most, want_x, want_dots>(a, row);
    for (; row < a.last; ++row) backward_rows<1, want_x, want_dots>(a, row);
  }

  static void backward(const Args& a) {
    if (a.grad_x && a.dots) {
      backward_all<true, true>(a);
    } else if (a.grad_x) {
      backward_all<true, false>(a);
    } else {
      backward_all<false, true>(a);
    }
  }
};

}  // namespace sparseprop
