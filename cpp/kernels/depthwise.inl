// Depthwise convolution of a padded plane, and its weight gradient: a row's outputs side by side in vectors, the weights
// of small kernels in registers. Limit: nine loads a vector, two of three across cache lines, 7.5 cycles; about 18 reached
// on planes of 56x56, with the plane, its output and what the chain reads next in and out of L1.
#pragma once
#include "lanes.inl"

namespace sparseprop {

template <class V>
struct Depthwise : private Lanes<V> {
  using Lanes<V>::get, Lanes<V>::put;
  using S = typename V::scalar;
  static constexpr ptrdiff_t w = V::width;

  // Fields are read one by one: a small plane takes no longer than the stall of a wide load of fields just stored.
  static void pad(const PaddingArgs<S>& a) {
    const Finish finish(a.finish);
    const S* x = a.x;
    S* to = a.to;
    const ptrdiff_t columns = a.columns, pitch = a.pitch, ahead = a.ahead;
    for (ptrdiff_t r = a.rows; r > 0; --r, x += columns, to += pitch) {
      for (ptrdiff_t i = 0; i < columns; i += w) {
        const ptrdiff_t count = columns - i < w ? columns - i : w;
        __builtin_prefetch(x + i + ahead);
        put(finish(get(x + i, count)), to + i, count);
      }
    }
  }
  static void forward(const DepthwiseArgs<S>& a) {
    pick(a, [&a](auto kernel, auto stride) {
      a.finish ? forward_as<kernel.value, stride.value>(a, Finish(*a.finish)) : forward_as<kernel.value, stride.value>(a, Nothing{});
    });
  }
  static void grad_weight(const DepthwiseArgs<S>& a) {
    pick(a, [&a](auto kernel, auto stride) { grad_weight_as<kernel.value, stride.value>(a); });
  }

 private:
  struct Finish {
    V scale, shift, low, cap;
    explicit Finish(const ChannelFinish<S>& f)
        : scale(V::broadcast(f.scale)), shift(V::broadcast(f.shift)), low(V::broadcast(f.low)), cap(V::broadcast(f.cap)) {}
    V operator()(V x) const { return V::min(cap, V::max(low, V::fma(x, scale, shift))); }
  };
  struct Nothing {
    V operator()(V x) const { return x; }
  };

  template <int n>
  struct Is {
    static constexpr int value = n;
  };

  // run(kernel height and width or 0, stride or 0), both known to the compiler
  template <class Run>
  static void pick(const DepthwiseArgs<S>& a, Run run) {
    const bool three = a.kernel_rows == 3 && a.kernel_columns == 3;
    if (a.stride == 1) return three ? run(Is<3>{}, Is<1>{}) : run(Is<0>{}, Is<1>{});
    if (a.stride == 2) return three ? run(Is<3>{}, Is<2>{}) : run(Is<0>{}, Is<2>{});
    run(Is<0>{}, Is<0>{});
  }

  template <int kernel, int stride, class Then>
  static void forward_as(const DepthwiseArgs<S>& args, const Then then) {
    const DepthwiseArgs<S> a = args;  // a copy that no store can change
    if constexpr (kernel == 0) {
      rows(a, [&](const S* in, S* out, ptrdiff_t count) __attribute__((always_inline)) {
        V sum = V::zero();
        const S* weight = a.weights;
        for (ptrdiff_t r = 0; r < a.kernel_rows; ++r, in += a.pitch)
          for (ptrdiff_t c = 0; c < a.kernel_columns; ++c) sum = V::fma(V::broadcast(*weight++), Lanes<V>::template every<stride>(in + c, a.stride), sum);
        put(then(sum), out, count);
      });
    } else {
      V weight[kernel * kernel];
      for (int t = 0; t < kernel * kernel; ++t) weight[t] = V::broadcast(a.weights[t]);
      rows(a, [&](const S* in, S* out, ptrdiff_t count) __attribute__((always_inline)) {
        V sum[kernel];  // a chain of sums for each row of the window
        for (int r = 0; r < kernel; ++r) {
          sum[r] = V::mul(weight[r * kernel], Lanes<V>::template every<stride>(in + r * a.pitch, a.stride));
          for (int c = 1; c < kernel; ++c) sum[r] = V::fma(weight[r * kernel + c], Lanes<V>::template every<stride>(in + r * a.pitch + c, a.stride), sum[r]);
        }
        for (int r = 1; r < kernel; ++r) sum[0] = V::add(sum[0], sum[r]);
        put(then(sum[0]), out, count);
      });
    }
  }

  template <int kernel, int stride>
  static void grad_weight_as(const DepthwiseArgs<S>& args) {
    const DepthwiseArgs<S> a = args;
    if constexpr (kernel == 0) {
      for (ptrdiff_t r = 0; r < a.kernel_rows; ++r) {
        for (ptrdiff_t c = 0; c < a.kernel_columns; ++c) {
          V sum = V::zero();
          rows(a, [&](const S* in, const S* grad, ptrdiff_t count) __attribute__((always_inline)) {
            sum = V::fma(get(grad, count), V::keep_some(Lanes<V>::template every<stride>(in + r * a.pitch + c, a.stride), count), sum);
          });
          a.sums[r * a.kernel_columns + c] += static_cast<double>(sum.sum());
        }
      }
    } else {
      V sum[kernel * kernel];
      for (V& s : sum) s = V::zero();
      rows(a, [&](const S* in, const S* grad, ptrdiff_t count) __attribute__((always_inline)) {
        const V g = get(grad, count);
        for (int r = 0; r < kernel; ++r) {
          for (int c = 0; c < kernel; ++c) {
            V& s = sum[r * kernel + c];
            s = V::fma(g, V::keep_some(Lanes<V>::template every<stride>(in + r * a.pitch + c, a.stride), count), s);
          }
        }
      });
      for (int t = 0; t < kernel * kernel; ++t) a.sums[t] += static_cast<double>(sum[t].sum());
    }
  }

  // visit(first element of the windows, outputs, how many)
  template <class Visit>
  static inline __attribute__((always_inline)) void rows(const DepthwiseArgs<S>& a, Visit visit) {
    const ptrdiff_t n = a.n, step = w * a.stride, in_pitch = a.row_stride * a.pitch;
    const S* in_row = a.padded;
    S* out = a.out;
    for (ptrdiff_t h = a.rows; h > 0; --h, in_row += in_pitch, out += a.out_pitch) {
      const S* in = in_row;
      ptrdiff_t i = 0;
      for (; i + w <= n; i += w, in += step) visit(in, out + i, w);
      if (i < n) visit(in, out + i, n - i);
    }
  }
};

}  // namespace sparseprop
