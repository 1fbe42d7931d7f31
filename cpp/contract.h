// What the kernels of the contraction are given, and those that move its panels.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparseprop {

struct bf16 {
  uint16_t bits;
};

// `rows` consecutive segments of exactly `count` non-zeros each: trip counts that a branch predictor can learn.
// `first` marks the first segment of its row in the stream: it writes (bias or 0), later ones add.
struct Run {
  uint32_t rows;
  uint32_t count;
  uint32_t first;
};

// The non-zeros of one part of the rows in one block of the panel. A segment is one row's share of the block. Kernels
// look ahead: the two arrays per segment have kLookAhead elements past the last one, the offsets have one.
constexpr int kLookAhead = 8;

struct BlockStream {
  const Run* runs;
  size_t n_runs;
  const uint32_t* segment_row;    // row inside the part, per segment
  const uint32_t* segment_value;  // position of the segment's first value
  const uint16_t* offset;         // per non-zero, in units of 1 << unit_log2 elements from the block's panel
};

// Lane groups per tile at most. What a non-zero costs beyond its FMAs (index, broadcast, sum of a dot product) is shared
// by twice the columns of 4: 10 to 20 % faster at 50 and 80 % sparsity and on convolutions.
constexpr int kMaxTile = 8;

template <class S>
struct ForwardArgs {
  BlockStream stream;
  const S* values;
  const S* bias;  // of the part's first row, or null
  const S* panel;
  unsigned unit_log2;
  S* out;  // tile of the part: row r at out + r * out_pitch, 64-byte aligned, padded to whole vectors
  ptrdiff_t out_pitch;
  bool cold;  // the values have probably left the cache since they were last used
  bool onto;  // add to what `out` holds
};

template <class S>
struct BackwardArgs {
  BlockStream stream;
  const S* values;  // in stream order
  const S* panel;   // grad_out
  unsigned unit_log2;
  const S* x;  // same pitch and alignment as `grad_x`
  S* grad_x;   // null: no input gradient
  ptrdiff_t pitch;
  S* dots;          // weight gradient of this block's non-zeros, in stream order
  bool accumulate;  // add to dots instead of writing
  bool onto;        // add to what `grad_x` holds
};

// Adjacent columns of a row, and where they come from; from < 0: zeros.
struct ColumnRun {
  int32_t to, from, count;
};

// Runs of a panel's rows, by rising `to`, to where tiles begin at whole vectors. What lies behind the last run up to a whole
// vector is overwritten, and behind a run in the panel read.
template <class S>
struct RunsArgs {
  S* to;
  ptrdiff_t to_pitch;
  const S* from;
  ptrdiff_t from_pitch, rows;
  const ColumnRun* runs;
  ptrdiff_t n_runs;
};

// 16 x 16 weights: where there is one, and where each column's first lies in the order of columns.
struct WeightTile {
  static constexpr int side = 16;
  uint16_t row[side], column[side];
  uint32_t place[side];
};

// A band of tiles, `columns` times `rows` one below the other, and where its rows begin in the order of rows.
struct WeightTiles {
  static constexpr int most_rows = 4;
  const WeightTile* tiles;
  ptrdiff_t columns, rows;
  const uint32_t* row_start;  // of `rows` times 16 rows
};

// For tiles of at most kMaxRowTile lane groups (with 4, layers of 50 % density are slower than by input rows): grad_out and
// x in panels of the same pitch.
constexpr int kMaxRowTile = 2;

template <class S>
struct BackwardRowsArgs {
  BlockStream stream;  // of the forward pattern
  const S* values;
  const S* grad_out;
  const S* x;  // the block's rows
  S* grad_x;   // added to, where x has the same row; null: no input gradient
  unsigned unit_log2;
  ptrdiff_t pitch;
  S* dots;  // weight gradient, like the values; null: none
};

// Linear on few batch entries. Row r of the pattern: bits at bits + r * bits_pitch, lowest first, values from start[r] on. Rows of
// x and grad_x are padded to `windows` whole vectors, aligned; x, grad_x have one row per batch entry, as have out and grad_out.
template <class S>
struct BitmapArgs {
  const uint8_t* bits;
  ptrdiff_t bits_pitch;
  const int64_t* start;
  ptrdiff_t nnz, windows, batch;
  ptrdiff_t first, last;  // rows of the pattern
  const S* values;
  const S* x;
  ptrdiff_t x_pitch;
  const S* bias;  // or null
  S* out;
  const S* grad_out;
  ptrdiff_t out_pitch;
  S* grad_x;  // added to; null: no input gradient
  S* dots;    // weight gradient, like the values; null: none
};

// Moving rows or blocks between a tensor and a panel; In and Out may differ (bfloat16 on one side).
// copy:      dst[r * dst.pitch + i * dst.stride] = src[r * src.pitch + i * src.stride],  r < rows, i < cols
// transpose: dst[j * dst_pitch + i] = src[i * src_pitch + j],                            i < rows, j < cols
// planes:    copy for each of several planes; then the `zeros` elements behind all rows of dst but the last become 0
// interleave: for each plane, the `n` given rows of dst from two rows of src each
struct Layout2 {
  ptrdiff_t pitch, stride;
};
struct Layout3 {
  ptrdiff_t plane, pitch, stride;
};
struct Extent3 {
  ptrdiff_t planes, rows, cols, zeros;
};

// The elements of a row, from a plane's first one on, come in turn from two rows of another plane; 0 for a source < 0.
struct Interleaved {
  ptrdiff_t to, even, odd, count;
};

template <class In, class Out>
struct Movers {
  void (*copy)(Out* dst, Layout2 to, const In* src, Layout2 from, ptrdiff_t rows, ptrdiff_t cols);
  void (*transpose)(Out* dst, ptrdiff_t dst_pitch, const In* src, ptrdiff_t src_pitch, ptrdiff_t rows,
                    ptrdiff_t cols);
  void (*planes)(Out* dst, Layout3 to, const In* src, Layout3 from, Extent3 extent);
  void (*interleave)(Out* dst, ptrdiff_t dst_pitch, const In* src, ptrdiff_t src_pitch, ptrdiff_t planes,
                     const Interleaved* rows, ptrdiff_t n);
};

}  // namespace sparseprop
