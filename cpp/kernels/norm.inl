// Batch norm with what follows it (a residual addition, ReLU) in as few passes over memory as there can be.
// Planes: runs of n elements of one channel, several channels one after the other. Rows: element i is channel i.
#pragma once
#include "ahead.inl"
#include "lanes.inl"

namespace sparseprop {

template <class V, bool Planes>
struct Norm : private Lanes<V> {
  using Lanes<V>::get, Lanes<V>::put, Lanes<V>::subtract;
  using S = typename V::scalar;
  static constexpr ptrdiff_t w = V::width;
  static constexpr ptrdiff_t terms = Planes ? 256 * w : 32;  // of a channel, summed up before they go into doubles
  static constexpr ptrdiff_t scratch_per_channel = Planes ? 2 * w : 2;

  // sum and squares += those of x - mean
  static void sums(const NormArgs<S>& a, double* sum, double* squares, S* scratch) {
    reduce(a, sum, squares, scratch, [&a](At at, ptrdiff_t len, ptrdiff_t c, auto add) __attribute__((always_inline)) {
      const Param mean(a.mean + c);
      columns(len, [&](ptrdiff_t i, ptrdiff_t count) __attribute__((always_inline)) {
        const V d = V::keep_some(subtract(take(a.x, at.x, i, count), mean(i, count)), count);
        add(i, count, d, d, d);
      });
    });
  }

  // out = act(x * scale + shift + residual)
  static void apply(const NormArgs<S>& a) {
    if (may_stream(a)) {
      apply_to<true>(a);
      return V::fence();
    }
    apply_to<false>(a);
  }

  // sum of g and of g * (x - mean), where g is grad where the activation let it pass; g goes to `masked` if wanted
  static void grad_sums(const NormArgs<S>& a, double* sum, double* product, S* scratch) {
    reduce(a, sum, product, scratch, [&a](At at, ptrdiff_t len, ptrdiff_t c, auto add) __attribute__((always_inline)) {
      const Param mean(a.mean + c);
      const Gate gate(a, c);
      columns(len, [&](ptrdiff_t i, ptrdiff_t count) __attribute__((always_inline)) {
        const V x = take(a.x, at.x, i, count), g = gate(at.all, i, x, count);
        if (a.masked) give(g, a.masked, at.all, i, count);
        add(i, count, g, g, subtract(x, mean(i, count)));
      });
    });
  }

  // out = g * scale_grad + (x - mean) * slope + offset, without the last two if there is no slope
  static void grad_apply(const NormArgs<S>& a) {
    if (a.slope && may_stream(a)) {
      grad_apply_as<true, true>(a);
      return V::fence();
    }
    a.slope ? grad_apply_as<true, false>(a) : grad_apply_as<false, false>(a);
  }

 private:
  // Where a run begins in an array, and how far behind it lies what is to be asked for meanwhile: the same channel in a
  // later image, as the hardware prefetcher starts anew on each plane (5 % of sums, 10 % of the others).
  struct Place {
    ptrdiff_t run, ahead;
  };
  // In x, in out, and in all else.
  struct At {
    Place x, out, all;
  };

  static SPARSEPROP_INLINE V take(const S* array, Place at, ptrdiff_t i, ptrdiff_t count) {
    if (Planes) __builtin_prefetch(array + at.run + i + at.ahead);
    return get(array + at.run + i, count);
  }
  // Past the caches, whole lines are written without being read first.
  template <bool past_cache>
  static SPARSEPROP_INLINE void give_out(V v, S* array, Place at, ptrdiff_t i, ptrdiff_t count) {
    if (past_cache) return v.stream(array + at.run + i);
    give(v, array, at, i, count);
  }
  static SPARSEPROP_INLINE void give(V v, S* array, Place at, ptrdiff_t i, ptrdiff_t count) {
    if (Planes) __builtin_prefetch(array + at.run + i + at.ahead, 1);
    put(v, array + at.run + i, count);
  }

  // A number per channel: one for a run of a plane, one for each element of a row.
  struct Param {
    const S* p;
    V v;
    explicit Param(const S* p) : p(p), v(V::broadcast(*p)) {}
    V operator()(ptrdiff_t i, ptrdiff_t count) const { return Planes ? v : get(p + i, count); }
  };

  // The gradient where the activation let it pass. Without `other` (the output) the sign of the output is computed
  // again, by the very operations of `apply`.
  struct Gate {
    const NormArgs<S>& a;
    Param scale, shift;
    V cap;
    Gate(const NormArgs<S>& a, ptrdiff_t c) : a(a), scale(a.scale + c), shift(a.shift + c), cap(V::broadcast(a.cap)) {}
    V operator()(Place at, ptrdiff_t i, V x, ptrdiff_t count) const {
      const V g = take(a.grad, at, i, count);
      if (!(a.cap > S(0))) return g;
      const V y = a.other ? take(a.other, at, i, count) : V::fma(x, scale(i, count), shift(i, count));
      return V::where_positive(subtract(cap, y), V::where_positive(y, g));
    }
  };

  // Whether every run of the output begins and ends with a cache line.
  static bool may_stream(const NormArgs<S>& a) {
    constexpr auto line = static_cast<ptrdiff_t>(64 / sizeof(S));
    return Planes && a.past_cache && reinterpret_cast<uintptr_t>(a.out) % 64 == 0 && a.n % line == 0 && a.out_pitch % line == 0;
  }

  template <bool past_cache>
  static void apply_to(const NormArgs<S>& a) {
    if (a.cap > S(0)) {
      a.other ? apply_as<true, true, past_cache>(a) : apply_as<true, false, past_cache>(a);
    } else {
      a.other ? apply_as<false, true, past_cache>(a) : apply_as<false, false, past_cache>(a);
    }
  }

  template <bool Relu, bool Residual, bool past_cache>
  static void apply_as(const NormArgs<S>& args) {
    const NormArgs<S> a = args;  // a copy that no store can change: rows are short
    runs(a, 0, a.rows, [&a](At at, ptrdiff_t len, ptrdiff_t c) __attribute__((always_inline)) {
      const Param scale(a.scale + c), shift(a.shift + c);
      const V cap = V::broadcast(a.cap);
      columns(len, [&](ptrdiff_t i, ptrdiff_t count) __attribute__((always_inline)) {
        V y = V::fma(take(a.x, at.x, i, count), scale(i, count), shift(i, count));
        if (Residual) y = V::add(y, take(a.other, at.all, i, count));
        if (Relu) y = V::min(cap, V::relu(y));
        give_out<past_cache>(y, a.out, at.out, i, count);
      });
    });
  }

  template <bool Training, bool past_cache>
  static void grad_apply_as(const NormArgs<S>& args) {
    const NormArgs<S> a = args;
    runs(a, 0, a.rows, [&a](At at, ptrdiff_t len, ptrdiff_t c) __attribute__((always_inline)) {
      const Gate gate(a, c);
      const Param scale(a.scale_grad + c), mean(a.mean + c), slope((Training ? a.slope : a.mean) + c), offset(a.offset + c);
      columns(len, [&](ptrdiff_t i, ptrdiff_t count) __attribute__((always_inline)) {
        const V x = take(a.x, at.x, i, count);
        const V g = a.masked ? take(a.masked, at.all, i, count) : gate(at.all, i, x, count);
        if (!Training) return give(V::mul(g, scale(i, count)), a.out, at.out, i, count);
        const V centred = subtract(x, mean(i, count));
        const V y = V::fma(centred, slope(i, count), offset(i, count));
        give_out<past_cache>(V::fma(g, scale(i, count), y), a.out, at.out, i, count);
      });
    });
  }

  // visit(where a run begins, its length, its first channel)
  template <class Visit>
  static inline __attribute__((always_inline)) void runs(const NormArgs<S>& a, ptrdiff_t begin, ptrdiff_t end, Visit visit) {
    const ptrdiff_t early = runs_ahead(a.channels * a.n * static_cast<ptrdiff_t>(sizeof(S)));
    for (ptrdiff_t r = begin; r < end; ++r) {
      const ptrdiff_t ahead = r + early < a.rows ? early : 0;
      At at{{r * a.x_pitch, ahead * a.x_pitch}, {r * a.out_pitch, ahead * a.out_pitch}, {r * a.pitch, ahead * a.pitch}};
      if (!Planes) {
        visit(at, a.channels, 0);
        continue;
      }
      for (ptrdiff_t c = 0; c < a.channels; ++c, at.x.run += a.n, at.out.run += a.n, at.all.run += a.n) visit(at, a.n, c);
    }
  }

  // one += first, two += second * third, for what visit(at, len, channel, add) gives to add(i, count, first, second, third)
  template <class Visit>
  static inline __attribute__((always_inline)) void reduce(const NormArgs<S>& a, double* one, double* two, S* scratch,
                                                           Visit visit) {
    const ptrdiff_t lanes = scratch_per_channel / 2, size = lanes * a.channels;
    const ptrdiff_t step = terms / a.n > 1 ? terms / a.n : 1;
    for (ptrdiff_t r = 0; r < a.rows; r += step) {
      for (ptrdiff_t i = 0; i < 2 * size; ++i) scratch[i] = S(0);
      runs(a, r, r + step < a.rows ? r + step : a.rows, [&](At at, ptrdiff_t len, ptrdiff_t c) {
        S *s = scratch + c * lanes, *t = s + size;
        if (!Planes) {
          visit(at, len, c, [=](ptrdiff_t i, ptrdiff_t count, V first, V second, V third) {
            put(V::add(get(s + i, count), first), s + i, count);
            put(V::fma(second, third, get(t + i, count)), t + i, count);
          });
          return;
        }
        V sum = V::loadu(s), product = V::loadu(t);
        visit(at, len, c, [&](ptrdiff_t, ptrdiff_t, V first, V second, V third) {
          sum = V::add(sum, first);
          product = V::fma(second, third, product);
        });
        sum.storeu(s);
        product.storeu(t);
      });
      for (ptrdiff_t c = 0; c < a.channels; ++c) {
        one[c] += static_cast<double>(Planes ? V::loadu(scratch + c * lanes).sum() : scratch[c]);
        two[c] += static_cast<double>(Planes ? V::loadu(scratch + c * lanes + size).sum() : scratch[c + size]);
      }
    }
  }

  template <class Body>
  static inline __attribute__((always_inline)) void columns(ptrdiff_t n, Body body) {
    ptrdiff_t i = 0;
    for (; i + w <= n; i += w) body(i, w);
    if (i < n) body(i, n - i);
  }
};

}  // namespace sparseprop
