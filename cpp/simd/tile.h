// `n` vectors that stay in registers. A recursion instead of an array and loops: gcc 12 leaves such arrays in memory
// once the code around them is unrolled (16 spilled vectors a segment, counted in the assembly).
#pragma once

// The kernels' speed rests on one inlined body: a call inside it would spill every vector.
#define SPARSEPROP_INLINE __attribute__((always_inline)) inline

namespace sparseprop {

template <class V, int n>
struct Tile {
  using S = typename V::scalar;
  Tile<V, n - 1> head;
  V last;

  static SPARSEPROP_INLINE Tile fill(V v) { return {Tile<V, n - 1>::fill(v), v}; }
  static SPARSEPROP_INLINE Tile load(const S* p) {
    return {Tile<V, n - 1>::load(p), V::load(p + (n - 1) * V::width)};
  }
  SPARSEPROP_INLINE void store(S* p) const {
    head.store(p);
    last.store(p + (n - 1) * V::width);
  }
  SPARSEPROP_INLINE void add(const Tile& other) {
    head.add(other.head);
    last = V::add(last, other.last);
  }
  // this += value * columns
  SPARSEPROP_INLINE void add_product(V value, const S* columns) {
    head.add_product(value, columns);
    last = V::fma(value, V::loadu(columns + (n - 1) * V::width), last);
  }
  // this += value * other
  SPARSEPROP_INLINE void add_product(V value, const Tile& other) {
    head.add_product(value, other.head);
    last = V::fma(value, other.last, last);
  }
  template <int i>
  SPARSEPROP_INLINE V& get() {
    if constexpr (i == n - 1) return last;
    else return head.template get<i>();
  }
};

template <class V>
struct Tile<V, 0> {
  using S = typename V::scalar;
  static SPARSEPROP_INLINE Tile fill(V) { return {}; }
  static SPARSEPROP_INLINE Tile load(const S*) { return {}; }
  SPARSEPROP_INLINE void store(S*) const {}
  SPARSEPROP_INLINE void add(const Tile&) {}
  SPARSEPROP_INLINE void add_product(V, const S*) {}
  SPARSEPROP_INLINE void add_product(V, const Tile&) {}
};

}  // namespace sparseprop
