#include "panel.h"

#include <algorithm>

#include "dispatch.h"

namespace sparseprop {
namespace {

// Data of the grid along its innermost coordinate: `count` positions from `column`, each `lanes` columns wide.
struct RunOfData {
  int64_t column;   // relative to Columns::begin
  int64_t element;  // in the tensor, of channel 0 and lane 0
  int64_t count, step, lanes;
};

// Grid dimensions with those merged that data covers without gaps.
struct Walk {
  int64_t dims = 0;
  bool last_is_group = false;  // the outermost one still counts groups of images
  int64_t extent[4], low[4], high[4], step[4];
};

Walk merge(const Grid& grid, const Placement& place) {
  Walk w;
  for (int d = 3; d >= 0; --d) {
    const int64_t extent = grid.extent[d], low = place.low[d], high = place.high[d], step = place.step[d];
    if (w.dims > 0) {
      const int64_t i = w.dims - 1;  // the dimension just inside
      const bool inner_full = w.low[i] == 0 && w.high[i] == w.extent[i];
      if (extent == 1 && low == 0 && high == 1) continue;
      if (inner_full && step == w.step[i] * w.extent[i] && !(d == 0 && grid.lanes > 1)) {
        w.low[i] = low * w.extent[i];
        w.high[i] = high * w.extent[i];
        w.extent[i] *= extent;
        continue;
      }
      if (w.extent[i] == 1 && inner_full && !(d == 0 && grid.lanes > 1)) {  // a lone inner dimension gives way
        w.extent[i] = extent, w.low[i] = low, w.high[i] = high, w.step[i] = step;
        continue;
      }
    }
    w.extent[w.dims] = extent, w.low[w.dims] = low, w.high[w.dims] = high, w.step[w.dims] = step;
    w.last_is_group = d == 0;
    ++w.dims;
  }
  return w;  // index 0 is the innermost
}

template <class Visit>
void for_each_run(const Grid& grid, const Placement& place, Columns columns, Visit visit) {
  const Walk w = merge(grid, place);
  const int64_t lanes = grid.lanes, total = grid.columns / lanes;
  int64_t position = std::max<int64_t>(0, columns.begin) / lanes;
  const int64_t stop = std::min(total, (columns.end + lanes - 1) / lanes);
  while (position < stop) {
    int64_t rest = position / w.extent[0], element = place.base, outermost = 0;
    bool inside = true;
    for (int64_t d = 1; d < w.dims; ++d) {
      const int64_t q = d + 1 < w.dims ? rest % w.extent[d] : rest;
      rest /= w.extent[d];
      inside = inside && q >= w.low[d] && q < w.high[d];
      element += q * w.step[d];
      outermost = q;
    }
    const int64_t q0 = position % w.extent[0], row = position - q0;
    const int64_t begin = std::max(q0, w.low[0]), end = std::min(w.high[0], stop - row);
    if (inside && begin < end) {
      const int64_t valid = lanes == 1 ? 1 : grid.valid_lanes(w.last_is_group ? outermost : 0);
      visit(RunOfData{(row + begin) * lanes - columns.begin, element + begin * w.step[0], end - begin, w.step[0], valid});
    }
    position = row + w.extent[0];
  }
}

// Panel columns that no run writes are zero: the gaps between runs, cut where tiles end.
template <class S>
class Gaps {
 public:
  Gaps(const KernelsOf<S>& kernels, S* panel, const PanelShape& shape, int64_t rows)
      : kernels_(kernels), panel_(panel), shape_(shape), rows_(rows) {}

  void fill_up_to(int64_t column) {
    while (done_ < column) {
      const bool cut = shape_.tile != shape_.tile_pitch;
      const int64_t n = cut ? std::min(column - done_, shape_.tile - done_ % shape_.tile) : column - done_;
      kernels_.zero(panel_ + shape_.at(done_), shape_.row_pitch, rows_, n);
      done_ += n;
    }
  }
  void skip_to(int64_t column) { done_ = column; }

 private:
  const KernelsOf<S>& kernels_;
  S* panel_;
  const PanelShape& shape_;
  int64_t rows_, done_ = 0;
};

}  // namespace

template <class In, class S>
void pack(const Kernels& kernels, const Grid& grid, const Placement& place, const In* tensor, int64_t first,
          int64_t channels, Columns columns, S* panel, const PanelShape& shape) {
  const Movers<In, S>& move = movers<In, S>(kernels);
  const int64_t cs = place.channel_step, ls = place.lane_step, pitch = shape.row_pitch, lanes = grid.lanes;
  tensor += first * cs;
  auto one_lane = [&](S* dst, const In* src, int64_t count, int64_t step) {
    if (cs == 1 && step != 1) {
      move.transpose(dst, pitch, src, step, count, channels);
    } else {
      move.copy(dst, {pitch, 1}, src, {cs, step}, channels, count);
    }
  };
  auto batch_lanes = [&](S* dst, const In* src, int64_t count, int64_t step, int64_t valid) {
    if (valid < lanes) kernels_of<S>(kernels).zero(dst, pitch, channels, count * lanes);
    if (cs == 1) {
      for (int64_t i = 0; i < count; ++i) move.transpose(dst + i * lanes, pitch, src + i * step, ls, valid, channels);
    } else if (step == 1) {
      for (int64_t c = 0; c < channels; ++c) move.transpose(dst + c * pitch, lanes, src + c * cs, ls, valid, count);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        move.copy(dst + c * pitch, {lanes, 1}, src + c * cs, {step, ls}, count, valid);
    }
  };
  const bool cut = shape.tile != shape.tile_pitch;  // runs end where tiles do
  Gaps<S> gaps(kernels_of<S>(kernels), panel, shape, channels);
  for_each_run(grid, place, columns, [&](const RunOfData& run) {
    gaps.fill_up_to(run.column);
    int64_t i = 0;
    if (cut && lanes == 1 && cs != 1 && run.column % shape.tile == 0) {
      // Whole tiles, one channel after the other: long reads, each row's pages once.
      const int64_t tiles = run.count / shape.tile;
      for (int64_t c = 0; tiles > 0 && c < channels; ++c)
        move.copy(panel + c * pitch + shape.at(run.column), {shape.tile_pitch, 1}, tensor + run.element + c * cs,
                  {shape.tile * run.step, run.step}, tiles, shape.tile);
      i = tiles * shape.tile;
    }
    while (i < run.count) {
      const int64_t column = run.column + i * lanes, left = run.count - i;
      const int64_t n = cut ? std::min(left, (shape.tile - column % shape.tile) / lanes) : left;
      S* dst = panel + shape.at(column);
      const In* src = tensor + run.element + i * run.step;
      if (lanes == 1) {
        one_lane(dst, src, n, run.step);
      } else {
        batch_lanes(dst, src, n, run.step, run.lanes);
      }
      i += n;
    }
    gaps.skip_to(run.column + run.count * lanes);
  });
  gaps.fill_up_to(columns.end - columns.begin);
}

template <class S, class Out>
void unpack(const Kernels& kernels, const Grid& grid, const Placement& place, Out* tensor, int64_t first,
            int64_t channels, Columns columns, const S* panel, int64_t pitch) {
  const Movers<S, Out>& move = movers<S, Out>(kernels);
  const int64_t cs = place.channel_step, ls = place.lane_step, lanes = grid.lanes;
  tensor += first * cs;
  for_each_run(grid, place, columns, [&](const RunOfData& run) {
    const S* src = panel + run.column;
    Out* dst = tensor + run.element;
    if (lanes > 1) {
      if (cs == 1) {
        for (int64_t i = 0; i < run.count; ++i)
          move.transpose(dst + i * run.step, ls, src + i * lanes, pitch, channels, run.lanes);
      } else if (run.step == 1) {
        for (int64_t c = 0; c < channels; ++c)
          move.transpose(dst + c * cs, ls, src + c * pitch, lanes, run.count, run.lanes);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          move.copy(dst + c * cs, {run.step, ls}, src + c * pitch, {lanes, 1}, run.count, run.lanes);
      }
    } else if (cs == 1 && run.step != 1) {
      move.transpose(dst, run.step, src, pitch, channels, run.count);
    } else {
      move.copy(dst, {cs, run.step}, src, {pitch, 1}, channels, run.count);
    }
  });
}

template void pack(const Kernels&, const Grid&, const Placement&, const float*, int64_t, int64_t, Columns, float*,
                   const PanelShape&);
template void pack(const Kernels&, const Grid&, const Placement&, const double*, int64_t, int64_t, Columns, double*,
                   const PanelShape&);
template void pack(const Kernels&, const Grid&, const Placement&, const bf16*, int64_t, int64_t, Columns, float*,
                   const PanelShape&);
template void unpack(const Kernels&, const Grid&, const Placement&, float*, int64_t, int64_t, Columns, const float*,
                     int64_t);
template void unpack(const Kernels&, const Grid&, const Placement&, double*, int64_t, int64_t, Columns, const double*,
                     int64_t);
template void unpack(const Kernels&, const Grid&, const Placement&, bf16*, int64_t, int64_t, Columns, const float*,
                     int64_t);

}  // namespace sparseprop
