// Plain C++: correct on any CPU, the yardstick for the others. Same interface as avx2.h and avx512.h.
#pragma once
#include <cmath>

#include "convert.h"
#include "transpose_lanes.h"

namespace sparseprop::scalar {

template <class S>
struct Vec {
  using scalar = S;
  static constexpr int width = 4;
  static constexpr int registers = 16;
  S lane[width];

  static Vec in_register(Vec x) { return x; }
  static Vec zero() { return broadcast(S(0)); }
  static Vec broadcast(S x) { return {{x, x, x, x}}; }
  static Vec load(const S* p) { return {{p[0], p[1], p[2], p[3]}}; }
  template <class In>
  static Vec loadu(const In* p) {
    Vec r;
    for (int i = 0; i < width; ++i) r.lane[i] = To<S>::from(p[i]);
    return r;
  }
  void store(S* p) const { storeu(p); }
  void stream(S* p) const { storeu(p); }
  static void fence() {}
  template <class Out>
  void storeu(Out* p) const {
    for (int i = 0; i < width; ++i) p[i] = To<Out>::from(lane[i]);
  }
  // The first n < width lanes; load_even takes every second element.
  template <class In>
  static Vec load_some(const In* p, ptrdiff_t n) {
    Vec r = zero();
    for (ptrdiff_t i = 0; i < n; ++i) r.lane[i] = To<S>::from(p[i]);
    return r;
  }
  template <class Out>
  void store_some(Out* p, ptrdiff_t n) const {
    for (ptrdiff_t i = 0; i < n; ++i) p[i] = To<Out>::from(lane[i]);
  }
  template <class In>
  static Vec load_even(const In* p) {
    Vec r;
    for (int i = 0; i < width; ++i) r.lane[i] = To<S>::from(p[2 * i]);
    return r;
  }
  // The lanes of a and b in turn, as two vectors.
  static void zip(Vec a, Vec b, Vec& low, Vec& high) {
    for (int i = 0; i < 2 * width; ++i) (i < width ? low : high).lane[i % width] = (i % 2 ? b : a).lane[i / 2];
  }
  static Vec keep_some(Vec x, ptrdiff_t n) {
    for (ptrdiff_t i = n; i < width; ++i) x.lane[i] = S(0);
    return x;
  }
  // NaN stays NaN, and lets gradients pass, as in torch.
  static Vec relu(Vec x) {
    for (int i = 0; i < width; ++i) x.lane[i] = x.lane[i] <= S(0) ? S(0) : x.lane[i];
    return x;
  }
  static Vec min(Vec cap, Vec x) {
    for (int i = 0; i < width; ++i) x.lane[i] = cap.lane[i] < x.lane[i] ? cap.lane[i] : x.lane[i];
    return x;
  }
  static Vec where_positive(Vec x, Vec g) {
    for (int i = 0; i < width; ++i) g.lane[i] = x.lane[i] <= S(0) ? S(0) : g.lane[i];
    return g;
  }
  static Vec max(Vec a, Vec b) {
    for (int i = 0; i < width; ++i) b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return b;
  }
  static Vec round(Vec x) {
    for (int i = 0; i < width; ++i) x.lane[i] = std::nearbyint(x.lane[i]);
    return x;
  }
  static Vec times_power(Vec x, Vec n) {
    for (int i = 0; i < width; ++i) x.lane[i] = std::ldexp(x.lane[i], static_cast<int>(n.lane[i]));
    return x;
  }
  S largest() const {
    S most = lane[0];
    for (int i = 1; i < width; ++i) most = lane[i] > most ? lane[i] : most;
    return most;
  }
  // See avx512.h.
  static void take_larger(Vec value, Vec at, Vec& best, Vec& best_at) {
    for (int i = 0; i < width; ++i) {
      const bool wins = value.lane[i] > best.lane[i] || value.lane[i] != value.lane[i];
      best.lane[i] = wins ? value.lane[i] : best.lane[i];
      best_at.lane[i] = wins ? at.lane[i] : best_at.lane[i];
    }
  }
  void store_bytes(uint8_t* p) const {
    for (int i = 0; i < width; ++i) p[i] = static_cast<uint8_t>(lane[i]);
  }
  static Vec add(Vec a, Vec b) {
    for (int i = 0; i < width; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Vec mul(Vec a, Vec b) {
    for (int i = 0; i < width; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < width; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  S sum() const { return (lane[0] + lane[1]) + (lane[2] + lane[3]); }
  static Vec expand(Vec x, unsigned bits) {
    Vec r = zero();
    for (int i = 0, from = 0; i < width; ++i)
      if (bits >> i & 1) r.lane[i] = x.lane[from++];
    return r;
  }
  using Lanes = unsigned;
  static Lanes lanes(unsigned bits) { return bits; }
  static Vec fma_in(Lanes some, Vec a, Vec b, Vec c) {
    for (int i = 0; i < width; ++i) c.lane[i] = some >> i & 1 ? std::fma(a.lane[i], b.lane[i], c.lane[i]) : c.lane[i];
    return c;
  }
  static Vec compress(Vec x, unsigned bits) {
    Vec r = zero();
    for (int i = 0, to = 0; i < width; ++i)
      if (bits >> i & 1) r.lane[to++] = x.lane[i];
    return r;
  }
  // Four horizontal sums in two steps, see avx512.h.
  static Vec fold4(Vec a, Vec b, Vec c, Vec d) { return {{a.sum(), b.sum(), c.sum(), d.sum()}}; }
  template <int n>
  static void finish4(Vec folded, S* dots, bool accumulate) {
    for (int i = 0; i < n; ++i) dots[i] = accumulate ? dots[i] + folded.lane[i] : folded.lane[i];
  }
  // Lane j of x[i] becomes lane i of x[j].
  static void transpose(Vec (&x)[width]) { transpose_lanes(x); }
};

using F32 = Vec<float>;
using F64 = Vec<double>;

}  // namespace sparseprop::scalar
