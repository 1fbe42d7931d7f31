// Lowering: a Linear or Conv layer and one call's sizes become a flattened grid of columns.
//
// Stride splits the padded input into phases: input coordinate = stride * q + phase - padding. On the grid of q, tap
// t of the kernel is a constant shift (t * dilation) / stride of phase (t * dilation) % stride, so every stride,
// dilation and kernel size is one offset per non-zero. Rows of the grid share their zero halo: what runs off the
// right edge lands on the left halo of the next row, so a 3x3 kernel needs W + 1 positions a row, not W + 2.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sparseprop {

using Triple = std::array<int64_t, 3>;   // depth, height, width
using Strides = std::array<int64_t, 5>;  // batch, channel, depth, height, width; in elements

struct Layer {
  int64_t out_channels, in_channels, groups;
  Triple kernel, stride, dilation;

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t row_size() const { return in_channels / groups * taps(); }
};

// Sizes of one call. `padding` is the left one; positions outside the input read 0.
struct Sizes {
  int64_t batch;
  Triple in, padding, out;

  bool operator==(const Sizes& o) const {
    return batch == o.batch && in == o.in && padding == o.padding && out == o.out;
  }
};

// Where one tensor (or one phase of it) lies on the grid. Coordinates (group of `lanes` images, d, h, w).
struct Placement {
  std::array<int64_t, 4> low, high;  // data at low <= q < high
  std::array<int64_t, 4> step;       // elements per coordinate
  int64_t lane_step;                 // elements between images of one group
  int64_t channel_step;
  int64_t base;                      // element of channel 0, lane 0 at coordinate 0 (may lie outside the tensor)
};

struct Grid {
  int64_t batch;
  int64_t lanes;                  // images side by side per position; 1: positions are the columns
  std::array<int64_t, 4> extent;  // positions
  std::array<int64_t, 4> pitch;   // in positions
  int64_t columns;
  int64_t max_shift;              // in columns
  std::vector<Triple> phases;     // those that some tap reads, in the order of panel rows
  std::vector<Triple> idle_phases;

  int64_t valid_lanes(int64_t group) const {
    const int64_t left = batch - group * lanes;
    return left < lanes ? left : lanes;
  }
};

struct Tap {
  int64_t phase;  // index into Grid::phases
  int64_t shift;  // in columns
};

Grid make_grid(const Layer& layer, const Sizes& sizes, int64_t lanes);
std::vector<Tap> make_taps(const Layer& layer, const Grid& grid);
// Where a tap finds grad_out, which lies max_shift columns into its panel: a shift against the output becomes one to the right.
std::vector<Tap> mirrored_taps(const Layer& layer, const Grid& grid);
Placement place_input(const Layer& layer, const Sizes& sizes, const Grid& grid, const Strides& strides, const Triple& phase);
Placement place_output(const Sizes& sizes, const Grid& grid, const Strides& strides);

}  // namespace sparseprop
