// The contract of every kernel. Kernels know pointers only; nothing here allocates, checks or starts threads.
//
// One contraction serves every layer. A *column* is a position of the flattened grid (a batch entry, a pixel, or
// both). A *tile* is up to 8 * lanes adjacent columns whose accumulators stay in registers. A *panel* holds the
// rows that are reduced over, packed so that `panel + (offset << unit_log2)` is where a non-zero's columns start.
//
//   forward        out[row, tile]     = bias[row] + sum over non-zeros of  value * panel[offset(nz) + tile]
//   grad_input     the same on the transposed pattern
//   grad_values    dot[nz]            = <x[row, tile], panel[offset(nz) + tile]>, panel = grad_out
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

// Batch norm over `rows` runs of `channels` * `n` adjacent elements, `pitch` apart, those of x and out at pitches of their
// own. Planes: n elements of each channel one after the other. Rows: n is 1. Parameters are arrays of `channels`.
template <class S>
struct NormArgs {
  ptrdiff_t rows, pitch, x_pitch, out_pitch, channels, n;
  S cap;  // 0: no activation; infinity: ReLU; else ReLU that stops there, as ReLU6
  const S* x;
  const S* other;  // forward: what is added before the activation; backward: the output; or null
  const S* grad;
  S* masked;  // gradient where the activation let it pass: written by grad_sums, read by grad_apply; or null
  S* out;
  const S *scale, *shift;               // x * scale + shift is the normalized x
  const S *mean;                        // sums: any number close to the mean
  const S *scale_grad, *slope, *offset;  // grad_apply: g * scale_grad [+ (x - mean) * slope + offset if slope]
  bool past_cache;  // out is larger than the caches: planes of apply and grad_apply are written past them
};

// sums and grad_sums add to doubles, one per channel.
template <class S>
struct NormKernels {
  ptrdiff_t scratch_per_channel;  // elements
  void (*sums)(const NormArgs<S>&, double* sum, double* squares, S* scratch);
  void (*apply)(const NormArgs<S>&);
  void (*grad_sums)(const NormArgs<S>&, double* sum, double* product, S* scratch);
  void (*grad_apply)(const NormArgs<S>&);
};

// Max pooling of one output row: `rows` rows of `taps` elements a window, in a plane padded with -infinity that may be
// read as far as a whole vector of outputs needs. `at`: the number of the maximum in its window, or null; `first` +
// `outside` is that of the first element inside the plane, the answer where nothing is larger than -infinity.
template <class S>
struct PoolRow {
  const S* padded;
  ptrdiff_t pitch, rows, taps, stride, n;
  const S* first;  // per output
  S outside;
  S* out;
  uint8_t* at;
};

// What follows each element of a channel: x * scale + shift, then no less than `low` and no more than `cap`.
template <class S>
struct ChannelFinish {
  S scale, shift, low, cap;
};

// A plane on its way into its padding: to[r * pitch + i] = finish(x[r * columns + i]). What lies `ahead` elements behind x
// is wanted next.
template <class S>
struct PaddingArgs {
  const S* x;
  ptrdiff_t rows, columns, ahead;
  S* to;
  ptrdiff_t pitch;
  ChannelFinish<S> finish;
};

// Partial sums of one channel, in vectors side by side: `lanes` elements for each, of which an ISA may use the first ones.
// Whoever made them adds up all.
//
// Of what a batch norm sees: y - mean and its square; with its gradient, g and g * (y - mean), where g is what the
// activation lets pass.
template <class S>
struct NormSums {
  const S* grad;    // or null
  ptrdiff_t ahead;  // what lies so many elements behind `grad`, or the outputs without one, is wanted next
  ChannelFinish<S> finish;
  S mean;      // any number close to it will do without a gradient
  S* partial;  // two vectors
};

// Depthwise convolution of a plane padded with zeros, which may be read as far as a whole vector of outputs needs.
template <class S>
struct DepthwiseArgs {
  const S* padded;
  ptrdiff_t pitch, kernel_rows, kernel_columns, row_stride, stride;
  const S* weights;
  S* out;  // `rows` of n adjacent elements
  ptrdiff_t out_pitch, rows, n;
  const ChannelFinish<S>* finish;  // of the outputs, or null
  const NormSums<S>* sums;         // of the outputs, in rows without gaps, or null; not both
};

// Its gradients, of a plane x that goes through `norm` (whose gradient is not known yet) before the convolution:
// grad_x[i] = what the activation lets pass of the sum over t of weights[t] * grad[i + t], and its sums; to the sums of
// weight t, a vector each, comes activation(x[i]) * grad[i + t]. Weights, and their sums, from last to first.
template <class S>
struct DepthwiseGradArgs {
  const S* grad;  // padded with zeros, at the distance of the windows: every element of x has a window of it
  ptrdiff_t pitch, kernel_rows, kernel_columns;
  ptrdiff_t row_stride, first_row;  // rows of the window that hold a gradient, of that around the first row of x
  const S* weights;
  const S* x;
  S* grad_x;  // `rows` of n adjacent elements, like x
  ptrdiff_t rows, n, ahead;  // what lies `ahead` elements behind x is wanted next
  NormSums<S> norm;
  S* weight_sums;
};

// Dense product: c[r * c_pitch + j] = (or +=) sum over k < depth of A(r, k) * b[k * b_pitch + j], where A(r, k) is
// a[r * a_pitch + k], or a[k * a_pitch + r] if `transposed`. `columns` and pitches are multiples of lanes, b and c aligned.
struct ProductArgs {
  ptrdiff_t rows, columns, depth;
  const float* a;
  ptrdiff_t a_pitch;
  bool transposed;
  const float* b;
  ptrdiff_t b_pitch;
  float* c;
  ptrdiff_t c_pitch;
  bool accumulate;
};

// Rows of attention scores, masked ones -infinity; `columns` and pitch are multiples of lanes.
// softmax:       scores become their exponentials over the row's largest; log_sum: of all exponentials, infinity if they
//                are all 0; factor: what normalizes them, 0 then
// softmax_grad:  scores become probabilities by log_sum, grads of the probabilities those of the scores
struct ScoreRows {
  ptrdiff_t rows, columns, pitch;
  float *scores, *grads, *log_sum, *factor;
};

// dst[r * dst_pitch + j] = src[r * src_pitch + j] * factor[r * factor_step]; `columns` is a multiple of lanes.
struct ScaleArgs {
  ptrdiff_t rows, columns;
  const float* src;
  ptrdiff_t src_pitch;
  const float* factor;
  ptrdiff_t factor_step;
  float* dst;
  ptrdiff_t dst_pitch;
};

struct AttentionKernels {
  void (*product)(const ProductArgs&);
  void (*softmax)(const ScoreRows&);
  void (*softmax_grad)(const ScoreRows&);
  void (*scale)(const ScaleArgs&);
};

template <class S>
struct KernelsOf {
  // Index v - 1: a tile of v * lanes columns.
  void (*forward[kMaxTile])(const ForwardArgs<S>&);
  void (*backward[kMaxTile])(const BackwardArgs<S>&);
  void (*backward_rows[kMaxRowTile])(const BackwardRowsArgs<S>&);
  void (*bitmap_forward)(const BitmapArgs<S>&);
  void (*bitmap_backward)(const BitmapArgs<S>&);
  ptrdiff_t vector;  // elements
  void (*zero)(S* dst, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t cols);
  void (*row_sums)(S* sums, const S* panel, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t cols);  // sums[r] +=
  Movers<S, S> move;
  NormKernels<S> planes, rows;
  void (*max_pool_row)(const PoolRow<S>&);
  void (*pad_plane)(const PaddingArgs<S>&);
  void (*depthwise)(const DepthwiseArgs<S>&);
  void (*depthwise_grad)(const DepthwiseGradArgs<S>&);
};

struct Kernels {
  const char* name;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  Movers<bf16, float> from_bf16;
  Movers<float, bf16> to_bf16;
  AttentionKernels attention;
  void (*gelu_backward)(const float* grad, const float* x, float* grad_x, ptrdiff_t n);
};

// Columns per lane group: one AVX-512 register. Every ISA uses the same tiles, so results do not depend on padding.
template <class S>
constexpr int lanes() {
  return 64 / static_cast<int>(sizeof(S));
}
extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

}  // namespace sparseprop
