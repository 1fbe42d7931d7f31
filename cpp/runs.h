// Where a range of the grid's columns holds data, and where in the tensor that lies.
#pragma once
#include <algorithm>

#include "lowering.h"

namespace sparseprop {

struct Columns {
  int64_t begin, end;  // of the grid; begin may be negative, end beyond it: those columns are zero
};

// Data of the grid along its innermost coordinate: `count` positions from `column`, each with data in `lanes` of its
// columns; and `rows` such runs at equal distances, as an image in a padded one.
struct RunOfData {
  int64_t column;   // relative to Columns::begin
  int64_t element;  // in the tensor, of channel 0 and lane 0
  int64_t count, step, lanes;
  int64_t rows = 1, column_pitch = 0, element_pitch = 0;

  // Not for the next image, if that lies beyond the next channel: memory is read in order.
  bool take(const RunOfData& next, int64_t channel_step) {
    const int64_t columns = next.column - column, elements = next.element - element;
    if (next.count != count || elements >= channel_step || elements < 0) return false;
    if (rows == 1) column_pitch = columns, element_pitch = elements;
    if (columns != rows * column_pitch || elements != rows * element_pitch) return false;
    ++rows;
    return true;
  }
};

// Grid dimensions with those merged that data covers without gaps.
struct Walk {
  int64_t dims = 0;
  bool last_is_group = false;  // the outermost one still counts groups of images
  int64_t extent[4], low[4], high[4], step[4];
};

inline Walk merge(const Grid& grid, const Placement& place) {
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

// The same, with the rows of an image at once where neither lanes, channels nor tiles lie between them.
template <class Visit>
void for_each_image(const Grid& grid, const Placement& place, Columns columns, Visit visit) {
  RunOfData image{};
  for_each_run(grid, place, columns, [&](const RunOfData& run) {
    if (image.count > 0 && image.take(run, place.channel_step)) return;
    if (image.count > 0) visit(image);
    image = run;
  });
  if (image.count > 0) visit(image);
}

}  // namespace sparseprop
