// Walking a block's segments with every address known one step ahead: loads issue oldest first, so an address that is
// itself loaded only when needed waits behind all loads before it and then holds up its own (an inner loop of 2.8 ns
// per non-zero and 128 columns became 2.2; its 10 loads alone take 1.9).
#pragma once
#include "../kernels.h"
#include "../simd/tile.h"

namespace sparseprop {

template <class S, bool scaled>
struct Walk {
  const S* panel;
  unsigned unit_log2;
  const uint16_t* offset;
  const uint32_t *row, *value;
  const S* next;  // columns of the next non-zero

  SPARSEPROP_INLINE Walk(const BlockStream& s, const S* columns, unsigned log2)
      : panel(columns), unit_log2(log2), offset(s.offset), row(s.segment_row), value(s.segment_value) {
    next = at(*offset);
  }
  SPARSEPROP_INLINE const S* at(uint16_t o) const {
    const S* columns = panel + (scaled ? size_t(o) << unit_log2 : size_t(o));
    asm("" : "+r"(columns));  // one address register: an indexed operand would split each FMA into two operations
    return columns;
  }
  // What a segment a few further on will use of an array in the order of values: pieces too short for the hardware.
  SPARSEPROP_INLINE void prefetch(const S* array) const {
    __builtin_prefetch(array + value[kLookAhead - 2]);
    __builtin_prefetch(array + value[kLookAhead - 2] + 16);
  }
  // The next non-zero's columns; reads one offset further.
  SPARSEPROP_INLINE const S* step() {
    const S* now = next;
    next = at(*++offset);
    return now;
  }
};

// body() `count` times; without a branch where the count is fixed (> 0) at compile time.
template <int fixed, class Body>
SPARSEPROP_INLINE void repeat(uint32_t count, Body&& body) {
  if constexpr (fixed == 0) {
    for (uint32_t i = 0; i < count; ++i) body();
  } else {
    body();
    if constexpr (fixed > 1) repeat<fixed - 1>(count, body);
  }
}

// Fixed trip counts cost compile time and code: for float32, on vectors, in the two widths that layers mostly have.
template <class V, int vecs>
constexpr bool worth_unrolling = V::width >= 8 && sizeof(typename V::scalar) == 4 && (vecs % 4 == 0 || vecs == 7);

// On a copy, whose members can live in registers.
template <int fixed, class Rows>
SPARSEPROP_INLINE void run_on_copy(Rows& rows, const Run& run) {
  Rows copy = rows;
  copy.template run<fixed>(run);
  rows = copy;
}

// rows.run<count>(run) for every run of a block; 0 for counts above 16. Fixed trip counts: a loop's last branch was
// mispredicted in nearly every other segment of five non-zeros (9 cycles a segment).
template <class Rows>
SPARSEPROP_INLINE void for_runs(const BlockStream& s, Rows rows) {
  for (size_t r = 0; r < s.n_runs; ++r) {
    const Run& run = s.runs[r];
    if constexpr (Rows::unrolled) {
      switch (run.count) {
        case 1: run_on_copy<1>(rows, run); continue;
        case 2: run_on_copy<2>(rows, run); continue;
        case 3: run_on_copy<3>(rows, run); continue;
        case 4: run_on_copy<4>(rows, run); continue;
        case 5: run_on_copy<5>(rows, run); continue;
        case 6: run_on_copy<6>(rows, run); continue;
        case 7: run_on_copy<7>(rows, run); continue;
        case 8: run_on_copy<8>(rows, run); continue;
        case 9: run_on_copy<9>(rows, run); continue;
        case 10: run_on_copy<10>(rows, run); continue;
        case 11: run_on_copy<11>(rows, run); continue;
        case 12: run_on_copy<12>(rows, run); continue;
        case 13: run_on_copy<13>(rows, run); continue;
        case 14: run_on_copy<14>(rows, run); continue;
        case 15: run_on_copy<15>(rows, run); continue;
        case 16: run_on_copy<16>(rows, run); continue;
        default: break;
      }
    }
    run_on_copy<0>(rows, run);
  }
}

}  // namespace sparseprop
