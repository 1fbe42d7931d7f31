// Forward contraction (and input gradient, on the transposed stream): the output tile stays in registers over a
// row's non-zeros, one panel load per FMA, no store inside.
#pragma once
#include "../kernels.h"

namespace sparseprop {

// `vecs` vectors per tile. `chains` independent accumulator sets hide the FMA latency (4 cycles, 2 a cycle: 8 chains).
// Two rows at a time instead of two chains per row: 20 % slower (more live pointers than registers).
// Prefetching the next rows' values: +2 % at 90 %, nothing elsewhere. Values gathered into stream order: no gain.
// Limit on Cascade Lake: 1.25 loads an FMA at 1.8 loads a cycle, 110 GF/s a core; 85 reached with 24 non-zeros a
// segment, 56 with 10, where a segment's own 16 line loads and stores cost 20 cycles.
// `scaled`: offsets are in units of 1 << unit_log2 elements rather than 1.
template <class V, int vecs, bool scaled>
struct Forward {
  using S = typename V::scalar;
  static constexpr int chains = vecs >= 6 ? 1 : vecs >= 3 ? 2 : 4;

  static inline void multiply_add(V (&acc)[vecs], V value, const S* panel, uint16_t offset, unsigned unit_log2) {
    const S* columns = panel + (scaled ? size_t(offset) << unit_log2 : size_t(offset));
    asm("" : "+r"(columns));  // one address register: an indexed operand would split each FMA into two operations
    for (int i = 0; i < vecs; ++i) acc[i] = V::fma(value, V::loadu(columns + i * V::width), acc[i]);
  }

  static inline void segment(V (&acc)[vecs], const S* values, const uint16_t* offset, uint32_t count, const S* panel,
                             unsigned unit_log2) {
    uint32_t k = 0;
    if (chains > 1 && count >= chains) {
      V extra[chains][vecs];
      for (int c = 1; c < chains; ++c)
        for (int i = 0; i < vecs; ++i) extra[c][i] = V::zero();
      for (; k + chains <= count; k += chains) {
        multiply_add(acc, V::broadcast(values[k]), panel, offset[k], unit_log2);
        for (int c = 1; c < chains; ++c)
          multiply_add(extra[c], V::broadcast(values[k + c]), panel, offset[k + c], unit_log2);
      }
      for (int c = 1; c < chains; ++c)
        for (int i = 0; i < vecs; ++i) acc[i] = V::add(acc[i], extra[c][i]);
    }
    for (; k < count; ++k) multiply_add(acc, V::broadcast(values[k]), panel, offset[k], unit_log2);
  }

  static void block(const ForwardArgs<S>& a, ptrdiff_t column) {
    const S* panel = a.panel + column;
    const uint16_t* offset = a.stream.offset;
    size_t s = 0;
    for (size_t r = 0; r < a.stream.n_runs; ++r) {
      const Run run = a.stream.runs[r];
      for (uint32_t end = 0; end < run.rows; ++end, ++s, offset += run.count) {
        const uint32_t row = a.stream.segment_row[s];
        S* out = a.out + row * a.out_pitch + column;
        V acc[vecs];
        if (run.first) {
          const V start = a.bias ? V::broadcast(a.bias[row]) : V::zero();
          for (int i = 0; i < vecs; ++i) acc[i] = start;
        } else {
          for (int i = 0; i < vecs; ++i) acc[i] = V::load(out + i * V::width);
        }
        segment(acc, a.values + a.stream.segment_value[s], offset, run.count, panel, a.unit_log2);
        for (int i = 0; i < vecs; ++i) acc[i].store(out + i * V::width);
      }
    }
  }
};

template <class V, int vecs>
void forward_pass(const ForwardArgs<typename V::scalar>& a, ptrdiff_t column) {
  if (a.unit_log2 == 0) {
    Forward<V, vecs, false>::block(a, column);
  } else {
    Forward<V, vecs, true>::block(a, column);
  }
}

// A tile of `vecs` vectors in passes that fit the registers.
template <class V, int vecs>
void forward_tile(const ForwardArgs<typename V::scalar>& a) {
  constexpr int most = 8, full = vecs / most * most;
  for (int i = 0; i < full; i += most) forward_pass<V, most>(a, i * V::width);
  if constexpr (vecs > full) forward_pass<V, vecs - full>(a, full * V::width);
}

}  // namespace sparseprop
