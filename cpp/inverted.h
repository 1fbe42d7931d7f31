// An inverted residual block in evaluation: [a sparse layer,] a depthwise convolution and a sparse layer, each with the
// batch norm and activation behind it. A few images at a time go through all of it, so that what lies between the layers
// stays in one core's cache.
#pragma once
#include "contraction.h"
#include "norm.h"
#include "windows.h"

namespace sparseprop {

// `sizes` are those of one image.
struct SparseStep {
  Contraction& layer;
  Sizes sizes;
  const void *values, *bias;  // bias may be null
  KnownNorm norm;
};

struct InvertedBlock {
  int64_t images;
  const SparseStep* expand;  // or null
  Windows windows;           // of the depthwise convolution; `planes` is not read
  int64_t channels;
  const void* weights;  // (channels, taps)
  KnownNorm norm;
  SparseStep project;
  const void* x;  // (images, channels, height, width), as out
  void* out;
};

// All tensors contiguous, of type S.
template <class S>
void run_block(const InvertedBlock& block);

}  // namespace sparseprop
