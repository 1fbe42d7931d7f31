// Batch norm with what follows it (a residual addition, ReLU) in as few passes over memory as there can be.
// Broadcast: all elements of a call belong to one channel (planes). Otherwise element i belongs to channel i.
#pragma once
#include <cstring>

#include "../kernels.h"

namespace sparseprop {

template <class V, bool Broadcast>
struct Norm {
  using S = typename V::scalar;
  static constexpr ptrdiff_t w = V::width;
  static constexpr ptrdiff_t flush_rows = 32;  // float sums of so many rows go into doubles

  static void sums(const NormArgs<S>& a, double* sum, double* squares, S* scratch) {
    if (Broadcast) {
      const V shift = V::broadcast(*a.mean);
      for (ptrdiff_t r = 0; r < a.rows; ++r) plane_sums(a.x + r * a.pitch, a.n, shift, *a.mean, sum, squares);
      return;
    }
    for (ptrdiff_t r0 = 0; r0 < a.rows; r0 += flush_rows) {
      const ptrdiff_t end = r0 + flush_rows < a.rows ? r0 + flush_rows : a.rows;
      clear(scratch, 2 * a.n);
      for (ptrdiff_t r = r0; r < end; ++r) {
        const S* x = a.x + r * a.pitch;
        columns(a.n, [&](ptrdiff_t i, ptrdiff_t count) {
          const V d = subtract(get(x + i, count), get(a.mean + i, count));
          put(V::add(get(scratch + i, count), d), scratch + i, count);
          put(V::fma(d, d, get(scratch + a.n + i, count)), scratch + a.n + i, count);
        });
      }
      flush(scratch, a.n, sum, squares);
    }
  }

  // out = act(x * scale + shift + residual)
  static void apply(const NormArgs<S>& a) {
    if (a.cap > S(0)) {
      a.other ? apply_as<true, true>(a) : apply_as<true, false>(a);
    } else {
      a.other ? apply_as<false, true>(a) : apply_as<false, false>(a);
    }
  }

  // sum of g and of g * (x - mean), where g is grad where the activation let it pass; g goes to `masked` if wanted
  static void grad_sums(const NormArgs<S>& a, double* sum, double* product, S* scratch) {
    if (!Broadcast) {
      for (ptrdiff_t r0 = 0; r0 < a.rows; r0 += flush_rows) {
        const ptrdiff_t end = r0 + flush_rows < a.rows ? r0 + flush_rows : a.rows;
        clear(scratch, 2 * a.n);
        for (ptrdiff_t r = r0; r < end; ++r) {
          columns(a.n, [&](ptrdiff_t i, ptrdiff_t count) {
            const ptrdiff_t at = r * a.pitch + i;
            const V x = get(a.x + at, count), g = masked(a, at, i, x, count);
            if (a.masked) put(g, a.masked + at, count);
            put(V::add(get(scratch + i, count), g), scratch + i, count);
            const V d = subtract(x, get(a.mean + i, count));
            put(V::fma(g, d, get(scratch + a.n + i, count)), scratch + a.n + i, count);
          });
        }
        flush(scratch, a.n, sum, product);
      }
      return;
    }
    const V mean = V::broadcast(*a.mean);
    for (ptrdiff_t r = 0; r < a.rows; ++r) {
      V one = V::zero(), two = V::zero();
      columns(a.n, [&](ptrdiff_t i, ptrdiff_t count) {
        const ptrdiff_t at = r * a.pitch + i;
        const V x = get(a.x + at, count), g = masked(a, at, 0, x, count);
        if (a.masked) put(g, a.masked + at, count);
        one = V::add(one, g);
        two = V::fma(g, subtract(x, mean), two);
      });
      *sum += static_cast<double>(one.sum());
      *product += static_cast<double>(two.sum());
    }
  }

  // out = g * scale_grad + (x - mean) * slope + offset, without the last two if there is no slope
  static void grad_apply(const NormArgs<S>& a) {
    for (ptrdiff_t r = 0; r < a.rows; ++r) {
      columns(a.n, [&](ptrdiff_t i, ptrdiff_t count) {
        const ptrdiff_t at = r * a.pitch + i, c = Broadcast ? 0 : i;
        const V x = get(a.x + at, count), g = a.masked ? get(a.masked + at, count) : masked(a, at, c, x, count);
        const V scale = param(a.scale_grad, c, count);
        if (!a.slope) return put(V::mul(g, scale), a.out + at, count);
        const V centred = subtract(x, param(a.mean, c, count));
        const V y = V::fma(centred, param(a.slope, c, count), param(a.offset, c, count));
        put(V::fma(g, scale, y), a.out + at, count);
      });
    }
  }

 private:
  template <bool Relu, bool Residual>
  static void apply_as(const NormArgs<S>& a) {
    for (ptrdiff_t r = 0; r < a.rows; ++r) {
      columns(a.n, [&](ptrdiff_t i, ptrdiff_t count) {
        const ptrdiff_t at = r * a.pitch + i;
        V y = affine(a, Broadcast ? 0 : i, get(a.x + at, count), count);
        if (Residual) y = V::add(y, get(a.other + at, count));
        if (Relu) y = V::min(V::broadcast(a.cap), V::relu(y));
        put(y, a.out + at, count);
      });
    }
  }

  static inline V affine(const NormArgs<S>& a, ptrdiff_t c, V x, ptrdiff_t count) {
    return V::fma(x, param(a.scale, c, count), param(a.shift, c, count));
  }

  // Without `other` (the output) the sign of the output is computed again, by the very operations of `apply`.
  static inline V masked(const NormArgs<S>& a, ptrdiff_t at, ptrdiff_t c, V x, ptrdiff_t count) {
    const V g = get(a.grad + at, count);
    if (!(a.cap > S(0))) return g;
    const V y = a.other ? get(a.other + at, count) : affine(a, c, x, count);
    return V::where_positive(subtract(V::broadcast(a.cap), y), V::where_positive(y, g));
  }

  static inline void plane_sums(const S* x, ptrdiff_t n, V shift, S pad, double* sum, double* squares) {
    V one = V::zero(), two = V::zero();
    columns(n, [&](ptrdiff_t i, ptrdiff_t count) {
      const V d = subtract(get(x + i, count, pad), shift);
      one = V::add(one, d);
      two = V::fma(d, d, two);
    });
    *sum += static_cast<double>(one.sum());
    *squares += static_cast<double>(two.sum());
  }

  static inline V subtract(V a, V b) { return V::fma(b, V::broadcast(S(-1)), a); }
  static inline V param(const S* p, ptrdiff_t i, ptrdiff_t count) { return Broadcast ? V::broadcast(*p) : get(p + i, count); }

  template <class Body>
  static inline __attribute__((always_inline)) void columns(ptrdiff_t n, Body body) {
    ptrdiff_t i = 0;
    for (; i + w <= n; i += w) body(i, w);
    if (i < n) body(i, n - i);
  }
  static inline V get(const S* p, ptrdiff_t count, S pad = S(0)) {
    if (count == w) return V::loadu(p);
    S buffer[w];
    for (ptrdiff_t i = 0; i < w; ++i) buffer[i] = i < count ? p[i] : pad;
    return V::loadu(buffer);
  }
  static inline void put(V v, S* p, ptrdiff_t count) {
    if (count == w) return v.storeu(p);
    S buffer[w];
    v.storeu(buffer);
    for (ptrdiff_t i = 0; i < count; ++i) p[i] = buffer[i];
  }
  static inline void clear(S* p, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; ++i) p[i] = S(0);
  }
  static inline void flush(const S* scratch, ptrdiff_t n, double* one, double* two) {
    for (ptrdiff_t i = 0; i < n; ++i) {
      one[i] += static_cast<double>(scratch[i]);
      two[i] += static_cast<double>(scratch[n + i]);
    }
  }
};

}  // namespace sparseprop
