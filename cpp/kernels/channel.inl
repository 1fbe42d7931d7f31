// A batch norm and its activation on vectors of one channel, and the sums that it wants of them.
#pragma once
#include "lanes.inl"

namespace sparseprop {

template <class V>
struct ChannelNorm {
  using S = typename V::scalar;
  V scale, shift, low, cap;
  explicit ChannelNorm(const ChannelFinish<S>& f)
      : scale(V::broadcast(f.scale)), shift(V::broadcast(f.shift)), low(V::broadcast(f.low)), cap(V::broadcast(f.cap)) {}

  V normed(V x) const { return V::fma(x, scale, shift); }
  V activated(V y) const { return V::min(cap, V::max(low, y)); }
  // The gradient where the activation let y pass.
  V gated(V y, V grad) const { return V::where_positive(Lanes<V>::subtract(cap, y), V::where_positive(Lanes<V>::subtract(y, low), grad)); }
};

// one += a, two += b * c, kept in memory between planes.
template <class V>
struct TwoSums {
  using S = typename V::scalar;
  S* partial;
  V one, two;
  explicit TwoSums(S* partial) : partial(partial), one(V::loadu(partial)), two(V::loadu(partial + lanes<S>())) {}

  SPARSEPROP_INLINE void add(V a, V b, V c) {
    one = V::add(one, a);
    two = V::fma(b, c, two);
  }
  void store() const {
    one.storeu(partial);
    two.storeu(partial + lanes<S>());
  }
};

// Of y - mean and its square.
template <class V>
struct Statistics : TwoSums<V> {
  using S = typename V::scalar;
  ptrdiff_t ahead;
  V mean;
  explicit Statistics(const NormSums<S>& sums) : TwoSums<V>(sums.partial), ahead(sums.ahead), mean(V::broadcast(sums.mean)) {}

  SPARSEPROP_INLINE V operator()(V y, S* out, ptrdiff_t, ptrdiff_t count) {
    __builtin_prefetch(out + ahead, 1);
    const V d = Lanes<V>::only(Lanes<V>::subtract(y, mean), count);
    this->add(d, d, d);
    return y;
  }
};

// Of g and g * (y - mean).
template <class V>
struct GradientSums : TwoSums<V>, private Lanes<V> {
  using S = typename V::scalar;
  const S* grad;
  ptrdiff_t ahead;
  ChannelNorm<V> norm;
  V mean;
  explicit GradientSums(const NormSums<S>& sums)
      : TwoSums<V>(sums.partial), grad(sums.grad), ahead(sums.ahead), norm(sums.finish), mean(V::broadcast(sums.mean)) {}

  SPARSEPROP_INLINE V operator()(V y, S*, ptrdiff_t at, ptrdiff_t count) {
    __builtin_prefetch(grad + at + ahead);
    const V g = norm.gated(norm.normed(y), Lanes<V>::get(grad + at, count));
    this->add(g, g, Lanes<V>::only(Lanes<V>::subtract(y, mean), count));
    return y;
  }
};

}  // namespace sparseprop
