// Part of a vector, and elements at a stride, for kernels that walk rows of any length.
#pragma once
#include "../kernels.h"

namespace sparseprop {

template <class V>
struct Lanes {
  using S = typename V::scalar;
  static constexpr ptrdiff_t w = V::width;

  // The first `count` lanes, up to all of them.
  static inline V get(const S* p, ptrdiff_t count) { return count == w ? V::loadu(p) : V::load_some(p, count); }
  static inline void put(V v, S* p, ptrdiff_t count) { count == w ? v.storeu(p) : v.store_some(p, count); }

  static inline V only(V v, ptrdiff_t count) { return count == w ? v : V::keep_some(v, count); }

  static inline V subtract(V a, V b) { return V::fma(b, V::broadcast(S(-1)), a); }

  // Every stride-th element; 0: every step-th, known at run time only.
  template <int stride>
  static inline V every(const S* p, ptrdiff_t step) {
    if constexpr (stride == 1) return V::loadu(p);
    if constexpr (stride == 2) return V::load_even(p);
    S lane[w];
    for (ptrdiff_t j = 0; j < w; ++j) lane[j] = p[j * step];
    return V::loadu(lane);
  }
};

}  // namespace sparseprop
