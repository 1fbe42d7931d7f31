// A sparse matrix's values from the order of its rows to that of its columns and back, 16 x 16 weights at a time: unfolded
// by their bits, transposed in registers, folded again. Tried: bands of one tile's height (a line then comes from L2 for each:
// backward 10 to 20 % slower); tiles through a buffer instead of registers (1.5 times the instructions, 3 % slower).
#pragma once
#include "../contract.h"
#include "../simd/tile.h"

namespace sparseprop {

template <class V>
struct Transpose {
  using S = typename V::scalar;
  static constexpr int w = V::width, side = WeightTile::side;
  static constexpr int far = 32;  // elements ahead in a row, four tiles at 50 % density: 16 are too late, 64 no better

  static SPARSEPROP_INLINE unsigned part(unsigned bits, int p) { return bits >> p & ((1u << w) - 1); }
  static SPARSEPROP_INLINE uint32_t count(unsigned bits) { return static_cast<uint32_t>(__builtin_popcount(bits)); }
  static SPARSEPROP_INLINE uint32_t place(const WeightTile& tile, int column, int row) {
    return tile.place[column] + count(tile.column[column] & ((1u << row) - 1));
  }

  static void gather(const WeightTiles& t, S* out, const S* values, ptrdiff_t nnz) {
    for_tiles(t, [&](const WeightTile& tile, const WeightTile& next, uint32_t* at) __attribute__((always_inline)) {
      ask_rows<0>(at, values);
      ask_columns<1>(next, out);
      for (int j = 0; j < side; j += w)
        for (int i = 0; i < side; i += w) {
          V lines[w];
#pragma GCC unroll 16
          for (int n = 0; n < w; ++n) {
            const unsigned bits = part(tile.row[i + n], j);
            const S* from = values + at[i + n];
            lines[n] = V::expand(nnz - at[i + n] >= w ? V::loadu(from) : V::load_some(from, nnz - at[i + n]), bits);
            at[i + n] += count(bits);
          }
          V::transpose(lines);
#pragma GCC unroll 16
          for (int n = 0; n < w; ++n) {
            const unsigned bits = part(tile.column[j + n], i);
            V::compress(lines[n], bits).store_some(out + place(tile, j + n, i), count(bits));
          }
        }
    });
  }

  // Reads as far as a vector behind the last dot product.
  static void scatter(const WeightTiles& t, S* out, const S* dots, ptrdiff_t splits, ptrdiff_t nnz) {
    for_tiles(t, [&](const WeightTile& tile, const WeightTile& next, uint32_t* at) __attribute__((always_inline)) {
      ask_rows<1>(at, out);
      for (ptrdiff_t s = 0; s < splits; ++s) ask_columns<0>(next, dots + s * nnz);
      for (int j = 0; j < side; j += w)
        for (int i = 0; i < side; i += w) {
          V lines[w];
#pragma GCC unroll 16
          for (int n = 0; n < w; ++n) {
            const S* from = dots + place(tile, j + n, i);
            V sum = V::loadu(from);
            for (ptrdiff_t s = 1; s < splits; ++s) sum = V::add(sum, V::loadu(from + s * nnz));
            lines[n] = V::expand(sum, part(tile.column[j + n], i));
          }
          V::transpose(lines);
#pragma GCC unroll 16
          for (int n = 0; n < w; ++n) {
            const unsigned bits = part(tile.row[i + n], j);
            V::compress(lines[n], bits).store_some(out + at[i + n], count(bits));
            at[i + n] += count(bits);
          }
        }
    });
  }

 private:
  // work(tile, one soon after, where its rows continue)
  template <class Work>
  static SPARSEPROP_INLINE void for_tiles(const WeightTiles& t, Work work) {
    uint32_t at[WeightTiles::most_rows * side];
    for (ptrdiff_t i = 0; i < t.rows * side; ++i) at[i] = t.row_start[i];
    for (ptrdiff_t k = 0; k < t.columns; ++k)
      for (ptrdiff_t r = 0; r < t.rows; ++r) {
        const WeightTile* tile = t.tiles + k * t.rows + r;
        work(*tile, tile[k + 1 < t.columns ? t.rows : 0], at + r * side);
      }
  }
  template <int write>
  static SPARSEPROP_INLINE void ask_columns(const WeightTile& tile, const S* columns) {
    for (int j = 0; j < side; ++j) __builtin_prefetch(columns + tile.place[j], write);
  }
  template <int write>
  static SPARSEPROP_INLINE void ask_rows(const uint32_t* at, const S* rows) {
    for (int i = 0; i < side; ++i) __builtin_prefetch(rows + at[i] + far, write);
  }
};

}  // namespace sparseprop
