// Depthwise convolution of a padded plane: a row's outputs side by side in vectors, the weights of small kernels in registers,
// and what follows each vector (a batch norm with known statistics, or the sums of one) before it is stored. Limit: nine loads a vector, two of three across cache lines, 7.5 cycles; about 18 reached
// on planes of 56x56, with the plane, its output and what the chain reads next in and out of L1.
#pragma once
#include "channel.inl"

namespace sparseprop {

template <class V>
struct Depthwise : private Lanes<V> {
  using Lanes<V>::get, Lanes<V>::put;
  using S = typename V::scalar;
  static constexpr ptrdiff_t w = V::width;

  // Fields are read one by one: a small plane takes no longer than the stall of a wide load of fields just stored.
  static void pad(const PaddingArgs<S>& a) {
    const ChannelNorm<V> norm(a.finish);
    const S* x = a.x;
    S* to = a.to;
    const ptrdiff_t columns = a.columns, pitch = a.pitch, ahead = a.ahead;
    for (ptrdiff_t r = a.rows; r > 0; --r, x += columns, to += pitch) {
      for (ptrdiff_t i = 0; i < columns; i += w) {
        const ptrdiff_t count = columns - i < w ? columns - i : w;
        __builtin_prefetch(x + i + ahead);
        put(norm.activated(norm.normed(get(x + i, count))), to + i, count);
      }
    }
  }
  static void forward(const DepthwiseArgs<S>& a) {
    pick(a, [&a](auto kernel, auto stride) {
      const auto run = [&a](auto then) { forward_as<decltype(kernel)::value, decltype(stride)::value>(a, then); };
      if (a.finish) return run(Finished(*a.finish));
      if (!a.sums) return run(Plain{});
      a.sums->grad ? run(GradientSums<V>(*a.sums)) : run(Statistics<V>(*a.sums));
    });
  }

 private:
  // What follows a vector of outputs: then(outputs, where they go, their number in the plane, how many)
  struct Finished : ChannelNorm<V> {
    using ChannelNorm<V>::ChannelNorm;
    V operator()(V y, S*, ptrdiff_t, ptrdiff_t) const { return ChannelNorm<V>::activated(ChannelNorm<V>::normed(y)); }
    void store() const {}
  };
  struct Plain {
    V operator()(V y, S*, ptrdiff_t, ptrdiff_t) const { return y; }
    void store() const {}
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
  static void forward_as(const DepthwiseArgs<S>& args, const Then& behind) {
    const DepthwiseArgs<S> a = args;  // copies that no store can change
    Then then = behind;
    if constexpr (kernel == 0) {
      rows(a, [&](const S* in, S* out, ptrdiff_t count) __attribute__((always_inline)) {
        V sum = V::zero();
        const S* weight = a.weights;
        for (ptrdiff_t r = 0; r < a.kernel_rows; ++r, in += a.pitch)
          for (ptrdiff_t c = 0; c < a.kernel_columns; ++c) sum = V::fma(V::broadcast(*weight++), Lanes<V>::template every<stride>(in + c, a.stride), sum);
        put(then(sum, out, out - a.out, count), out, count);
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
        put(then(sum[0], out, out - a.out, count), out, count);
      });
    }
    then.store();
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
