// [batch norm, activation,] depthwise convolution, batch norm, activation: all of it channel by channel, so that the planes
// of a channel go through the whole chain while they are in the cache. Nothing in between reaches memory, nor is it kept
// for the backward pass, which computes it again.
#pragma once
#include "norm.h"
#include "windows.h"

namespace sparseprop {

struct ChainShape {
  int64_t images, channels;
  Windows windows;
};

// A batch norm of the chain: its own tensors only (x, out, grad, ... are not read), and the cap of its activation.
template <class S>
struct ChainForward {
  const NormForward<S>*first, *second;  // first may be null
  double first_cap, second_cap;
  const S *x, *weights;  // weights: (channels, taps)
  S* out;
};

// grad_x and grad_weights may be null; grad_x may be grad where outputs are as many as inputs.
template <class S>
struct ChainBackward {
  const NormBackward<S>*first, *second;
  double first_cap, second_cap;
  const S *x, *weights, *grad;
  S *grad_x, *grad_weights;
};

template <class S>
void chain_forward(const ChainShape& shape, const ChainForward<S>& call);
template <class S>
void chain_backward(const ChainShape& shape, const ChainBackward<S>& call);

}  // namespace sparseprop
