// Gradients of a depthwise convolution of one plane, and of the activation in front of it, from the same loads: the
// window around an input holds all that comes of it, for its own gradient and for each weight's. Weights and sums have names of
// their own in `Nine`: as arrays they went through memory once a vector, and loads into both FMAs (40 cycles a vector, now 19).
#pragma once
#include <utility>

#include "../simd/tile.h"
#include "channel.inl"

namespace sparseprop {

template <class V>
struct DepthwiseGrad : private Lanes<V> {
  using Lanes<V>::get, Lanes<V>::put;
  using S = typename V::scalar;
  static constexpr ptrdiff_t w = V::width;

  static void run(const DepthwiseGradArgs<S>& a) {
    if (a.kernel_rows != 3 || a.kernel_columns != 3) return any(a);
    a.row_stride == 2 ? three<2>(a) : three<1>(a);
  }

 private:
  // Batch norm and activation in front of the convolution.
  struct Front : TwoSums<V> {
    ChannelNorm<V> norm;
    V mean;
    explicit Front(const NormSums<S>& sums) : TwoSums<V>(sums.partial), norm(sums.finish), mean(V::broadcast(sums.mean)) {}

    // The gradient that reaches x, whose normed value is y, from that behind the activation.
    SPARSEPROP_INLINE V through(V x, V y, V grad, ptrdiff_t count) {
      const V g = Lanes<V>::only(norm.gated(y, grad), count);
      this->add(g, g, Lanes<V>::subtract(x, mean));
      return g;
    }
  };

  // The weights of a 3x3 window and their sums, in registers.
  struct Nine {
    Tile<V, 9> weight, sum;
    template <int... t>
    Nine(const S* weights, const S* sums, std::integer_sequence<int, t...>) {
      ((weight.template get<t>() = V::broadcast(weights[t])), ...);
      ((sum.template get<t>() = V::loadu(sums + t * lanes<S>())), ...);
    }
    template <int... t>
    void store(S* sums, std::integer_sequence<int, t...>) {
      (sum.template get<t>().storeu(sums + t * lanes<S>()), ...);
    }
  };

  // Gradients lie in every `stride`-th row, or in all.
  template <int stride>
  static void three(const DepthwiseGradArgs<S>& args) {
    const DepthwiseGradArgs<S> a = args;  // a copy that no store can change
    constexpr auto all = std::make_integer_sequence<int, 9>();
    Nine nine(a.weights, a.weight_sums, all);
    Front front(a.norm);
    for (ptrdiff_t r = 0; r < a.rows; ++r) {
      const Row row{a.grad + r * a.pitch, a.x + r * a.n, a.grad_x + r * a.n, a.pitch, a.n, a.ahead};
      if (stride == 1) {
        row.template run<0, 1>(nine, front);
      } else if ((r + a.first_row) % 2 == 0) {
        row.template run<0, 2>(nine, front);
      } else {
        row.template run<1, 2>(nine, front);
      }
    }
    nine.store(a.weight_sums, all);
    front.store();
  }

  struct Row {
    const S *grad, *x;
    S* grad_x;
    ptrdiff_t pitch, n, ahead;

    // Rows first, first + step, ... of the windows hold gradients.
    template <int first, int step>
    SPARSEPROP_INLINE void run(Nine& nine, Front& front) const {
      ptrdiff_t i = 0;
      for (; i + w <= n; i += w) vector<first, step>(i, w, nine, front);
      if (i < n) vector<first, step>(i, n - i, nine, front);
    }

    template <int first, int step>
    SPARSEPROP_INLINE void vector(ptrdiff_t i, ptrdiff_t count, Nine& nine, Front& front) const {
      __builtin_prefetch(x + i + ahead);
      __builtin_prefetch(grad_x + i + ahead, 1);
      const V at = V::in_register(get(x + i, count)), y = front.norm.normed(at), in = Lanes<V>::only(front.norm.activated(y), count);
      const S* const around = grad + i;
      V total = line<first>(around, in, nine);
      if constexpr (first + step < 3) total = V::add(total, line<first + step>(around, in, nine));
      if constexpr (first + 2 * step < 3) total = V::add(total, line<first + 2 * step>(around, in, nine));
      put(front.through(at, y, total, count), grad_x + i, count);
    }

    // Row r of a window.
    template <int r>
    SPARSEPROP_INLINE V line(const S* around, V in, Nine& nine) const {
      const S* const row = around + r * pitch;
      return tap<3 * r + 2>(row + 2, in, nine, tap<3 * r + 1>(row + 1, in, nine, tap<3 * r>(row, in, nine, V::zero())));
    }
    template <int t>
    static SPARSEPROP_INLINE V tap(const S* grad, V in, Nine& nine, V sum) {
      const V g = V::in_register(V::loadu(grad));
      V& weight_sum = nine.sum.template get<t>();
      weight_sum = V::fma(in, g, weight_sum);
      const V weight = nine.weight.template get<t>();
      return t % 3 == 0 ? V::mul(weight, g) : V::fma(weight, g, sum);
    }
  };

  // Windows of any size: the weights one after the other.
  static void any(const DepthwiseGradArgs<S>& a) {
    Front front(a.norm);
    for (ptrdiff_t t = 0; t < a.kernel_rows * a.kernel_columns; ++t) {
      const S* const grad = a.grad + t / a.kernel_columns * a.pitch + t % a.kernel_columns;
      V sum = V::loadu(a.weight_sums + t * lanes<S>());
      each(a, [&](ptrdiff_t at, ptrdiff_t i, ptrdiff_t count) {
        const V in = Lanes<V>::only(front.norm.activated(front.norm.normed(get(a.x + at, count))), count);
        sum = V::fma(in, V::loadu(grad + i), sum);
      });
      sum.storeu(a.weight_sums + t * lanes<S>());
    }
    each(a, [&](ptrdiff_t at, ptrdiff_t i, ptrdiff_t count) {
      const V x = get(a.x + at, count);
      V total = V::zero();
      const S *weight = a.weights, *grad = a.grad + i;
      for (ptrdiff_t r = 0; r < a.kernel_rows; ++r, grad += a.pitch)
        for (ptrdiff_t c = 0; c < a.kernel_columns; ++c) total = V::fma(V::broadcast(*weight++), V::loadu(grad + c), total);
      put(front.through(x, front.norm.normed(x), total, count), a.grad_x + at, count);
    });
    front.store();
  }

  // visit(element of x, of the padded gradient, how many)
  template <class Visit>
  static SPARSEPROP_INLINE void each(const DepthwiseGradArgs<S>& a, Visit visit) {
    for (ptrdiff_t r = 0; r < a.rows; ++r)
      for (ptrdiff_t i = 0; i < a.n; i += w) visit(r * a.n + i, r * a.pitch + i, a.n - i < w ? a.n - i : w);
  }
};

}  // namespace sparseprop
