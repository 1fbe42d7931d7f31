// Batch norm fused with a residual addition and ReLU, or ReLU and max pooling, forward and backward, in the layout of
// its input.
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels.h"
#include "windows.h"

namespace sparseprop {

// An activation as (outer, channels, inner), inner contiguous: planes of one channel. inner == 1 is channels-last.
struct NormShape {
  int64_t outer, channels, inner;
  double cap;  // of the activation: 0 none, infinity ReLU, 6 ReLU6
};

// Running statistics. In training they are moved by `share` of the way towards those of a batch (the variance unbiased), if
// they are not null; otherwise they are what to normalize by.
template <class S>
struct Running {
  S *mean, *variance;
  double share;
};

// All of one type S (float or double). `mean` and `inv_std`, by which x is normalized, are written. With a `pool` (planes only,
// no residual) the result is that of max pooling behind it, and the full-sized one is never written to memory; `taps`: where
// the maxima lie, may be null.
template <class S>
struct NormForward {
  const S *x, *residual, *gamma, *beta;
  S *mean, *inv_std, *out;
  Running<S> running;
  bool training;
  double eps;
  const Windows* pool;
  uint8_t* taps;
};

// grad_residual may be grad itself, or grad_x where there is no grad_residual.
// `out` of the forward pass is needed for a ReLU after an addition only. Any of the results may be null, but
// `grad_residual` if there was a residual before a ReLU. With a `pool`, grad is that of the pooling's result.
template <class S>
struct NormBackward {
  const S *grad, *x, *out, *gamma, *beta, *mean, *inv_std;
  S *grad_x, *grad_residual, *grad_gamma, *grad_beta;
  bool training;
  const Windows* pool;
  const uint8_t* taps;
};

// x * scale + shift is channel c normalized; gamma and beta may be null.
template <class S>
struct Affine {
  S scale, shift;
  Affine(const S* gamma, const S* beta, int64_t c, double mean, double inv_std) {
    const double factor = (gamma ? double(gamma[c]) : 1.0) * inv_std;
    scale = static_cast<S>(factor);
    shift = static_cast<S>((beta ? double(beta[c]) : 0.0) - mean * factor);
  }
};

// The same with an activation behind it, as kernels take it.
template <class S>
ChannelFinish<S> channel_finish(S scale, S shift, double cap) {
  constexpr S most = std::numeric_limits<S>::infinity();
  return {scale, shift, cap > 0 ? S(0) : -most, cap > 0 ? static_cast<S>(cap) : most};
}

// A batch norm whose statistics are known and the activation behind it, as arrays per channel; gamma and beta may be null.
struct KnownNorm {
  const void *mean, *variance, *gamma, *beta;
  double eps, cap;
};

// What it does to each channel: x * scale + shift.
template <class S>
struct FoldedNorm {
  std::vector<S> scale, shift;
  FoldedNorm(const KnownNorm& norm, int64_t channels);
};

template <class S>
void norm_forward(const NormShape& shape, const NormForward<S>& call);
template <class S>
void norm_backward(const NormShape& shape, const NormBackward<S>& call);

}  // namespace sparseprop
