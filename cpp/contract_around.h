// What the kernels around the contraction are given: normalization, pooling, depthwise convolution, attention.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparseprop {

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
// softmax:       scores become the exponentials of their distances to the row's largest, `shift` (0 if all are hidden);
//                factor: what normalizes them, 0 then
// softmax_grad:  scores become probabilities by these two, grads of the probabilities those of the scores
struct ScoreRows {
  ptrdiff_t rows, columns, pitch;
  float *scores, *grads, *shift, *factor;
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

}  // namespace sparseprop
