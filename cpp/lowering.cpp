#include "lowering.h"

#include <algorithm>

namespace sparseprop {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PhaseRange {
  int64_t low, high;
};

// Positions q that hold input i = stride * q + phase - padding, 0 <= i < size.
PhaseRange phase_range(int64_t size, int64_t padding, int64_t stride, int64_t phase) {
  const int64_t low = std::max<int64_t>(0, ceil_div(padding - phase, stride));
  const int64_t last = size - 1 + padding - phase;
  return {low, last < 0 ? low : std::max(low, last / stride + 1)};
}

std::vector<int64_t> phases_read(int64_t kernel, int64_t stride, int64_t dilation) {
  std::vector<int64_t> phases;
  for (int64_t t = 0; t < kernel; ++t) {
    const int64_t phase = t * dilation % stride;
    if (std::find(phases.begin(), phases.end(), phase) == phases.end()) phases.push_back(phase);
  }
  std::sort(phases.begin(), phases.end());
  return phases;
}

bool contains(const std::vector<int64_t>& list, int64_t x) { return std::find(list.begin(), list.end(), x) != list.end(); }

}  // namespace

Grid make_grid(const Layer& layer, const Sizes& sizes, int64_t lanes) {
  Grid grid;
  grid.batch = sizes.batch;
  grid.lanes = lanes;
  grid.extent[0] = ceil_div(sizes.batch, lanes);
  std::array<std::vector<int64_t>, 3> read;
  Triple shift;
  for (int d = 0; d < 3; ++d) {
    read[d] = phases_read(layer.kernel[d], layer.stride[d], layer.dilation[d]);
    shift[d] = (layer.kernel[d] - 1) * layer.dilation[d] / layer.stride[d];
    int64_t halo = sizes.padding[d] + 1, end = sizes.out[d];
    for (int64_t f = 0; f < layer.stride[d]; ++f) {
      const PhaseRange range = phase_range(sizes.in[d], sizes.padding[d], layer.stride[d], f);
      if (contains(read[d], f)) halo = std::min(halo, range.low);
      end = std::max(end, range.high);
    }
    grid.extent[d + 1] = std::max(end, sizes.out[d] + shift[d] - halo);
  }
  grid.pitch[3] = 1;
  for (int d = 2; d >= 0; --d) grid.pitch[d] = grid.pitch[d + 1] * grid.extent[d + 1];
  grid.columns = grid.pitch[0] * grid.extent[0] * lanes;
  grid.max_shift = (shift[0] * grid.pitch[1] + shift[1] * grid.pitch[2] + shift[2]) * lanes;
  for (int64_t a = 0; a < layer.stride[0]; ++a)
    for (int64_t b = 0; b < layer.stride[1]; ++b)
      for (int64_t c = 0; c < layer.stride[2]; ++c) {
        const bool used = contains(read[0], a) && contains(read[1], b) && contains(read[2], c);
        (used ? grid.phases : grid.idle_phases).push_back({a, b, c});
      }
  return grid;
}

std::vector<Tap> make_taps(const Layer& layer, const Grid& grid) {
  std::vector<Tap> taps;
  for (int64_t a = 0; a < layer.kernel[0]; ++a)
    for (int64_t b = 0; b < layer.kernel[1]; ++b)
      for (int64_t c = 0; c < layer.kernel[2]; ++c) {
        const Triple at = {a * layer.dilation[0], b * layer.dilation[1], c * layer.dilation[2]};
        Triple phase;
        int64_t shift = 0;
        for (int d = 0; d < 3; ++d) {
          phase[d] = at[d] % layer.stride[d];
          shift += at[d] / layer.stride[d] * grid.pitch[d + 1];
        }
        const auto found = std::find(grid.phases.begin(), grid.phases.end(), phase);
        taps.push_back({found - grid.phases.begin(), shift * grid.lanes});
      }
  return taps;
}

std::vector<Tap> mirrored_taps(const Layer& layer, const Grid& grid) {
  std::vector<Tap> taps = make_taps(layer, grid);
  for (Tap& tap : taps) tap = {0, grid.max_shift - tap.shift};
  return taps;
}

Placement place_input(const Layer& layer, const Sizes& sizes, const Grid& grid, const Strides& strides,
                      const Triple& phase) {
  Placement p;
  p.low[0] = 0;
  p.high[0] = grid.extent[0];
  p.step[0] = strides[0] * grid.lanes;
  p.lane_step = strides[0];
  p.channel_step = strides[1];
  p.base = 0;
  for (int d = 0; d < 3; ++d) {
    const PhaseRange range = phase_range(sizes.in[d], sizes.padding[d], layer.stride[d], phase[d]);
    p.low[d + 1] = range.low;
    p.high[d + 1] = range.high;
    p.step[d + 1] = layer.stride[d] * strides[d + 2];
    p.base += (phase[d] - sizes.padding[d]) * strides[d + 2];
  }
  return p;
}

Placement place_output(const Sizes& sizes, const Grid& grid, const Strides& strides) {
  Placement p;
  p.low = {0, 0, 0, 0};
  p.high = {grid.extent[0], sizes.out[0], sizes.out[1], sizes.out[2]};
  p.step = {strides[0] * grid.lanes, strides[2], strides[3], strides[4]};
  p.lane_step = strides[0];
  p.channel_step = strides[1];
  p.base = 0;
  return p;
}

}  // namespace sparseprop
