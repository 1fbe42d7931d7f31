// Weight gradient, and the input gradient from the same loads of grad_out: walking the pattern by input rows, the tile
// of x and the sums of grad_x stay in registers. (The input gradient alone is the forward kernel.)
#pragma once
#include "walk.inl"

namespace sparseprop {

// Limit on Cascade Lake: 20 operations on two FMA ports per non-zero and 128 columns (8 + 8 FMAs, 4 for a dot product's
// sum), 3.8 ns; 5.1 reached in long segments, 7.8 with five non-zeros a segment (24 line loads and stores each).
// Tried: dot products left in a ring of vectors and summed 16 at a time (25 % slower: stores alias with panel loads),
// sums finished at once (20 %: their latency fills the reorder buffer), one non-zero after the other (5 %); walking output
// rows with x and grad_x in L1, which needs no transposed pattern (25 %: eight stores more per non-zero); the next segment's
// rows prefetched (11 %); values and dots in the order of rows, for a scatter that writes in order (5 to 8 %); each load folded
// into two FMAs (0).
template <class V, int vecs, bool want_x, bool scaled>
struct Backward {
  using S = typename V::scalar;
  using X = Tile<V, vecs>;
  using Sums = Tile<V, want_x ? vecs : 0>;
  using Four = Tile<V, 4>;
  static constexpr bool unrolled = worth_unrolling<V, vecs>;

  const S *all_values, *all_x;
  S* all_grad_x;
  ptrdiff_t pitch;
  bool accumulate, onto;
  Walk<S, scaled> walk;
  const S* values;  // of the next segment
  ptrdiff_t at;     // of the next segment's x and grad_x
  S* dots;
  V folded;  // the group before, half summed, and where its sums belong
  S* folded_dots;

  SPARSEPROP_INLINE Backward(const BackwardArgs<S>& args, ptrdiff_t first, bool add)
      : all_values(args.values), all_x(args.x + first), all_grad_x(want_x ? args.grad_x + first : nullptr),
        pitch(args.pitch), accumulate(add), onto(args.onto), walk(args.stream, args.panel + first, args.unit_log2), dots(args.dots) {
    look_ahead();
  }
  SPARSEPROP_INLINE void look_ahead() {
    values = all_values + *walk.value;
    at = *walk.row * pitch;
    asm("" : "+r"(values), "+r"(at));
  }

  template <int fixed>
  SPARSEPROP_INLINE void run(const Run run) {
    constexpr int rest = fixed % 4, last = fixed == 0 ? 0 : rest ? rest : 4;  // terms of a segment's last group
    folded = V::zero();  // there is no group before: adds nothing to dots that the first group then writes or adds to
    folded_dots = dots;
    for (uint32_t end = 0; end < run.rows; ++end) {
      X x = X::load(all_x + at);
      Sums grad_x = Sums::fill(V::zero());
      if (want_x && (!run.first || onto)) grad_x = Sums::load(all_grad_x + at);
      const S* value = values;
      const ptrdiff_t to = at;
      ++walk.row;
      ++walk.value;
      look_ahead();
      if constexpr (fixed == 0) {
        if (run.count >= 4) {
          group<4, 0>(x, grad_x, value);
          repeat<0>(run.count / 4 - 1, [&]() __attribute__((always_inline)) { group<4, 4>(x, grad_x, value); });
          V::template finish4<4>(folded, folded_dots, accumulate);
        }
        repeat<0>(run.count % 4, [&]() __attribute__((always_inline)) {
          group<1, 0>(x, grad_x, value);
          V::template finish4<1>(folded, folded_dots, accumulate);
        });
      } else {
        segment<fixed, last>(x, grad_x, value);
      }
      if constexpr (want_x) grad_x.store(all_grad_x + to);
    }
    if constexpr (fixed > 0) V::template finish4<last>(folded, folded_dots, accumulate);
  }

  template <int left, int before>
  SPARSEPROP_INLINE void segment(X& x, Sums& grad_x, const S*& value) {
    constexpr int terms = left < 4 ? left : 4;
    group<terms, before>(x, grad_x, value);
    if constexpr (left > 4) segment<left - 4, terms>(x, grad_x, value);
  }

  // `terms` non-zeros at once; finishes the sums of the group before (of `before` terms) beside them.
  template <int terms, int before>
  SPARSEPROP_INLINE void group(X& x, Sums& grad_x, const S*& value) {
    const S* columns[4];
    V v[4];
    start<terms, 0>(columns, v, value);
    Four even = Four::fill(V::zero()), odd = even;
    diagonal<terms, 0>(x, grad_x, columns, v, even, odd);
    if constexpr (!want_x && vecs > 1) even.add(odd);
    if constexpr (before > 0) V::template finish4<before>(folded, folded_dots, accumulate);
    folded = V::fold4(even.template get<0>(), even.template get<1>(), even.template get<2>(), even.template get<3>());
    folded_dots = dots;
    dots += terms;
  }

  template <int terms, int n>
  SPARSEPROP_INLINE void start(const S* (&columns)[4], V (&v)[4], const S*& value) {
    if constexpr (n < terms) {
      columns[n] = walk.step();
      v[n] = want_x ? V::broadcast(*value++) : V::zero();
      start<terms, n + 1>(columns, v, value);
    }
  }

  // On the diagonal: at step t the n-th term works on vector t + n, so that each chain of FMAs (a sum of grad_x, a dot
  // product) is touched once a step and none waits for its own latency.
  template <int terms, int t>
  static SPARSEPROP_INLINE void diagonal(X& x, Sums& grad_x, const S* const (&columns)[4], const V (&v)[4], Four& even,
                                         Four& odd) {
    if constexpr (t < vecs) {
      term<0, t>(x, grad_x, columns[0], v[0], even, odd);
      if constexpr (terms > 1) term<1, t>(x, grad_x, columns[1], v[1], even, odd);
      if constexpr (terms > 2) term<2, t>(x, grad_x, columns[2], v[2], even, odd);
      if constexpr (terms > 3) term<3, t>(x, grad_x, columns[3], v[3], even, odd);
      diagonal<terms, t + 1>(x, grad_x, columns, v, even, odd);
    }
  }
  template <int n, int t>
  static SPARSEPROP_INLINE void term(X& x, Sums& grad_x, const S* columns, V v, Four& even, Four& odd) {
    constexpr int i = (t + n) % vecs;
    V loaded = V::loadu(columns + i * V::width);
    if constexpr (want_x) {
      loaded = V::in_register(loaded);
      V& sum = grad_x.template get<i>();
      sum = V::fma(v, loaded, sum);
    }
    constexpr int chains = want_x ? 1 : 2;
    V& chain = (t % chains ? odd : even).template get<n>();
    chain = t < chains ? V::mul(x.template get<i>(), loaded) : V::fma(x.template get<i>(), loaded, chain);
  }
};

template <class V, int vecs, bool want_x>
void backward_pass(const BackwardArgs<typename V::scalar>& a, int first) {
  const ptrdiff_t column = first * V::width;
  const bool accumulate = a.accumulate || first > 0;
  if (a.unit_log2 == 0) {
    for_runs(a.stream, Backward<V, vecs, want_x, false>(a, column, accumulate));
  } else {
    for_runs(a.stream, Backward<V, vecs, want_x, true>(a, column, accumulate));
  }
}

template <class V, int vecs>
void backward_pass(const BackwardArgs<typename V::scalar>& a, int first) {
  if (a.grad_x) {
    backward_pass<V, vecs, true>(a, first);
  } else {
    backward_pass<V, vecs, false>(a, first);
  }
}

// A tile of `vecs` vectors in passes whose x, grad_x and temporaries fit the registers.
template <class V, int vecs>
void backward_tile(const BackwardArgs<typename V::scalar>& a) {
  if (a.stream.n_runs == 0) return;
  constexpr int most = V::registers / 4, full = vecs / most * most;
  for (int i = 0; i < full; i += most) backward_pass<V, most>(a, i);
  if constexpr (vecs > full) backward_pass<V, vecs - full>(a, full);
}

}  // namespace sparseprop
