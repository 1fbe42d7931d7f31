// Both gradients for few columns, walking the pattern by output rows: x and the sums of grad_x lie in L1, a row of grad_out
// in registers. Costs a load and a store more per vector than walking input rows, and saves bringing values and weight
// gradients into another order and back, which takes longer than all sums where columns are few.
#pragma once
#include "walk.inl"

namespace sparseprop {

template <class V, int vecs, bool want_x, bool want_dots, bool scaled>
struct BackwardRows {
  using S = typename V::scalar;
  using Grad = Tile<V, vecs>;
  using Four = Tile<V, 4>;
  static constexpr bool unrolled = false;

  const S *all_values, *all_grad;
  ptrdiff_t pitch, to_grad_x;  // from x to the sums of its gradient
  S* all_dots;
  bool accumulate;
  Walk<S, scaled> walk;
  V folded;  // the group before, half summed

  SPARSEPROP_INLINE BackwardRows(const BackwardRowsArgs<S>& args, ptrdiff_t first, bool add)
      : all_values(args.values), all_grad(args.grad_out + first), pitch(args.pitch), to_grad_x(want_x ? args.grad_x - args.x : 0),
        all_dots(args.dots), accumulate(add), walk(args.stream, args.x + first, args.unit_log2) {}

  template <int fixed>
  SPARSEPROP_INLINE void run(const Run run) {
    for (uint32_t end = 0; end < run.rows; ++end) {
      Grad grad = Grad::load(all_grad + *walk.row * pitch);
      const S* value = all_values + *walk.value;
      S* dots = all_dots + *walk.value;
      ask_ahead(run.count);
      ++walk.row;
      ++walk.value;
      if (run.count >= 4) {
        group<4>(grad, value);
        repeat<0>(run.count / 4 - 1, [&]() __attribute__((always_inline)) {
          finish<4>(dots);
          group<4>(grad, value);
        });
        finish<4>(dots);
      }
      repeat<0>(run.count % 4, [&]() __attribute__((always_inline)) {
        group<1>(grad, value);
        finish<1>(dots);
      });
    }
  }

  // For a whole segment further on: blocks are narrow, so that each row's share is a short piece of its own.
  SPARSEPROP_INLINE void ask_ahead(uint32_t count) const {
    const uint32_t next = walk.value[kLookAhead - 2];
    for (uint32_t k = 0; k < count; k += 16) {
      if constexpr (want_x) __builtin_prefetch(all_values + next + k);
      if constexpr (want_dots) __builtin_prefetch(all_dots + next + k, 1);
    }
  }

  template <int terms>
  SPARSEPROP_INLINE void finish(S*& dots) {
    if constexpr (want_dots) V::template finish4<terms>(folded, dots, accumulate);
    dots += terms;
  }

  template <int terms>
  SPARSEPROP_INLINE void group(Grad& grad, const S*& value) {
    Four dot = Four::fill(V::zero());
    term<terms, 0>(grad, value, dot);
    value += terms;
    if constexpr (want_dots) {
      folded = V::fold4(dot.template get<0>(), dot.template get<1>(), dot.template get<2>(), dot.template get<3>());
    }
  }

  template <int terms, int n>
  SPARSEPROP_INLINE void term(Grad& grad, const S* value, Four& dot) {
    const S* x = walk.step();
    add_up<0>(grad, x, V::broadcast(want_x ? value[n] : S(0)), dot.template get<n>());
    if constexpr (n + 1 < terms) term<terms, n + 1>(grad, value, dot);
  }
  template <int i>
  SPARSEPROP_INLINE void add_up(Grad& grad, const S* x, V value, V& dot) {
    V& g = grad.template get<i>();
    if constexpr (want_dots) {
      const V columns = V::load(x + i * V::width);
      dot = i == 0 ? V::mul(g, columns) : V::fma(g, columns, dot);
    }
    if constexpr (want_x) {
      S* to = const_cast<S*>(x) + to_grad_x + i * V::width;
      V::fma(value, g, V::load(to)).store(to);
    }
    if constexpr (i + 1 < vecs) add_up<i + 1>(grad, x, value, dot);
  }
};

template <class V, int vecs, bool want_x, bool want_dots>
void backward_rows_pass(const BackwardRowsArgs<typename V::scalar>& a, int first) {
  const ptrdiff_t column = first * V::width;
  if (a.unit_log2 == 0) {
    for_runs(a.stream, BackwardRows<V, vecs, want_x, want_dots, false>(a, column, first > 0));
  } else {
    for_runs(a.stream, BackwardRows<V, vecs, want_x, want_dots, true>(a, column, first > 0));
  }
}

template <class V, int vecs>
void backward_rows_pass(const BackwardRowsArgs<typename V::scalar>& a, int first) {
  if (a.grad_x && a.dots) {
    backward_rows_pass<V, vecs, true, true>(a, first);
  } else if (a.grad_x) {
    backward_rows_pass<V, vecs, true, false>(a, first);
  } else {
    backward_rows_pass<V, vecs, false, true>(a, first);
  }
}

// A tile of `vecs` vectors in passes whose rows of grad_out and temporaries fit the registers.
template <class V, int vecs>
void backward_rows(const BackwardRowsArgs<typename V::scalar>& a) {
  if (a.stream.n_runs == 0) return;
  constexpr int most = V::registers / 4, full = vecs / most * most;
  for (int i = 0; i < full; i += most) backward_rows_pass<V, most>(a, i);
  if constexpr (vecs > full) backward_rows_pass<V, vecs - full>(a, full);
}

}  // namespace sparseprop
