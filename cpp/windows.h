// Windows that slide over contiguous planes, of a max pooling or a depthwise convolution.
#pragma once
#include <array>
#include <cstdint>

namespace sparseprop {

using Pair = std::array<int64_t, 2>;  // height, width

// Padding at most half the kernel, so that every window holds an element; kernels of at most 255 elements.
struct Windows {
  int64_t planes;
  Pair in, out, kernel, stride, padding;

  int64_t in_size() const { return in[0] * in[1]; }
  int64_t out_size() const { return out[0] * out[1]; }
  int64_t taps() const { return kernel[0] * kernel[1]; }
};

}  // namespace sparseprop
