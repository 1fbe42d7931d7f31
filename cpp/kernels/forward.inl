// Forward contraction (and input gradient alone, on the transposed stream): the output tile stays in registers over a
// row's non-zeros, one panel load per FMA, no store inside.
#pragma once
#include "walk.inl"

namespace sparseprop {

// Limit on Cascade Lake: 10 loads per non-zero and 128 columns, 1.9 ns; 2.4 reached in long segments, 4.1 with five
// non-zeros a segment, where a segment's own 16 line loads and stores cost 5 ns and rows from L2 the rest.
// Tried: two rows at a time (20 % slower, more live pointers than registers), two to four chains of FMAs (0 to 2 %),
// four offsets in one load (0), values gathered into stream order (0), prefetching the next rows (0 to 2 %),
// panel and output in different cache sets (0), all of a long segment's values asked for early (0). For N:M, prototypes on
// Zen 5: rows as lanes, inputs permuted in registers, 0.26 ns a product of vectors at any density, beside 0.25 to 0.30 here at
// 2:4 and 0.31 to 0.40 at 1:8, 1.1 times at most with the backward pass; 2:4 inputs in registers, rows sorted by their pattern,
// 0.20 before mispredicted branches.
template <class V, int vecs, bool scaled>
struct Forward {
  using S = typename V::scalar;
  using Acc = Tile<V, vecs>;
  static constexpr bool unrolled = worth_unrolling<V, vecs>;

  const S *all_values, *bias;
  S* all_out;
  ptrdiff_t pitch;
  bool cold, onto;
  Walk<S, scaled> walk;
  const S* values;  // of the next segment
  S* out;           // of the next segment

  SPARSEPROP_INLINE Forward(const ForwardArgs<S>& args, ptrdiff_t column)
      : all_values(args.values), bias(args.bias), all_out(args.out + column), pitch(args.out_pitch), cold(args.cold), onto(args.onto),
        walk(args.stream, args.panel + column, args.unit_log2) {
    look_ahead();
  }
  SPARSEPROP_INLINE void look_ahead() {
    values = all_values + *walk.value;
    out = all_out + *walk.row * pitch;
    asm("" : "+r"(values), "+r"(out));
    if (cold) walk.prefetch(all_values);  // 6 to 9 % of a Linear of 1024x1024; in vain 2 to 8 % of a convolution without shifted copies
  }
  template <int fixed>
  SPARSEPROP_INLINE void run(const Run run) {
    for (uint32_t end = 0; end < run.rows; ++end) {
      Acc acc = !run.first || onto ? Acc::load(out) : Acc::fill(bias ? V::broadcast(bias[*walk.row]) : V::zero());
      const S* value = values;
      S* const to = out;
      ++walk.row;
      ++walk.value;
      look_ahead();
      uint32_t count = run.count;
      if constexpr (vecs <= 3) count = in_chains(acc, value, count);
      repeat<fixed>(count, [&]() __attribute__((always_inline)) {
        acc.add_product(V::broadcast(*value++), walk.step());
      });
      acc.store(to);
    }
  }
  // Few columns: four non-zeros at once, as one chain of FMAs would wait for its own latency. Returns how many are left.
  SPARSEPROP_INLINE uint32_t in_chains(Acc& acc, const S*& value, uint32_t count) {
    Acc second = Acc::fill(V::zero()), third = second, fourth = second;
    for (; count >= 4; count -= 4, value += 4) {
      acc.add_product(V::broadcast(value[0]), walk.step());
      second.add_product(V::broadcast(value[1]), walk.step());
      third.add_product(V::broadcast(value[2]), walk.step());
      fourth.add_product(V::broadcast(value[3]), walk.step());
    }
    second.add(fourth);
    acc.add(third);
    acc.add(second);
    return count;
  }
};

template <class V, int vecs>
void forward_pass(const ForwardArgs<typename V::scalar>& a, ptrdiff_t column) {
  if (a.unit_log2 == 0) {
    for_runs(a.stream, Forward<V, vecs, false>(a, column));
  } else {
    for_runs(a.stream, Forward<V, vecs, true>(a, column));
  }
}

// A tile of `vecs` vectors in passes that fit the registers.
template <class V, int vecs>
void forward_tile(const ForwardArgs<typename V::scalar>& a) {
  if (a.stream.n_runs == 0) return;
  constexpr int most = 8, full = vecs / most * most;
  for (int i = 0; i < full; i += most) forward_pass<V, most>(a, i * V::width);
  if constexpr (vecs > full) forward_pass<V, vecs - full>(a, full * V::width);
}

}  // namespace sparseprop
