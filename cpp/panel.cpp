#include "panel.h"

#include <algorithm>

#include "dispatch.h"

namespace sparseprop {
namespace {

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

// One call of `pack`: how runs of data reach the panel.
template <class In, class S>
class Packer {
 public:
  Packer(const Kernels& kernels, const Grid& grid, const Placement& place, const In* tensor, int64_t channels, S* panel,
         const PanelShape& shape)
      : kernels_(kernels_of<S>(kernels)), move_(movers<In, S>(kernels)), lanes_(grid.lanes), cs_(place.channel_step),
        ls_(place.lane_step), tensor_(tensor), channels_(channels), panel_(panel), shape_(shape),
        cut_(shape.tile != shape.tile_pitch) {}

  bool takes_images() const { return lanes_ == 1 && cs_ != 1 && !cut_; }

  void operator()(const RunOfData& run) const {
    if (run.rows > 1) {
      move_.planes(panel_ + run.column, {shape_.row_pitch, run.column_pitch, 1}, tensor_ + run.element,
                   {cs_, run.element_pitch, run.step}, {channels_, run.rows, run.count, run.column_pitch - run.count});
      return;
    }
    int64_t i = cut_ && lanes_ == 1 && cs_ != 1 && run.column % shape_.tile == 0 ? whole_tiles(run) : 0;
    while (i < run.count) {
      const int64_t column = run.column + i * lanes_, left = run.count - i;
      const int64_t n = cut_ ? std::min(left, (shape_.tile - column % shape_.tile) / lanes_) : left;
      S* dst = panel_ + shape_.at(column);
      const In* src = tensor_ + run.element + i * run.step;
      lanes_ == 1 ? one_lane(dst, src, n, run.step) : batch_lanes(dst, src, n, run.step, run.lanes);
      i += n;
    }
  }

 private:
  // One channel after the other: long reads, each row's pages once. Returns the positions done.
  int64_t whole_tiles(const RunOfData& run) const {
    const int64_t tiles = run.count / shape_.tile;
    move_.planes(panel_ + shape_.at(run.column), {shape_.row_pitch, shape_.tile_pitch, 1}, tensor_ + run.element,
                 {cs_, shape_.tile * run.step, run.step}, {channels_, tiles, shape_.tile, 0});
    return tiles * shape_.tile;
  }

  void one_lane(S* dst, const In* src, int64_t count, int64_t step) const {
    if (cs_ == 1 && step != 1) {
      move_.transpose(dst, shape_.row_pitch, src, step, count, channels_);
    } else {
      move_.copy(dst, {shape_.row_pitch, 1}, src, {cs_, step}, channels_, count);
    }
  }

  void batch_lanes(S* dst, const In* src, int64_t count, int64_t step, int64_t valid) const {
    const int64_t pitch = shape_.row_pitch;
    if (valid < lanes_) kernels_.zero(dst, pitch, channels_, count * lanes_);
    if (cs_ == 1) {
      for (int64_t i = 0; i < count; ++i) move_.transpose(dst + i * lanes_, pitch, src + i * step, ls_, valid, channels_);
    } else if (step == 1) {
      for (int64_t c = 0; c < channels_; ++c) move_.transpose(dst + c * pitch, lanes_, src + c * cs_, ls_, valid, count);
    } else {
      for (int64_t c = 0; c < channels_; ++c)
        move_.copy(dst + c * pitch, {lanes_, 1}, src + c * cs_, {step, ls_}, count, valid);
    }
  }

  const KernelsOf<S>& kernels_;
  const Movers<In, S>& move_;
  int64_t lanes_, cs_, ls_;
  const In* tensor_;
  int64_t channels_;
  S* panel_;
  const PanelShape& shape_;
  bool cut_;  // runs end where tiles do
};

}  // namespace

template <class In, class S>
void pack(const Kernels& kernels, const Grid& grid, const Placement& place, const In* tensor, int64_t first,
          int64_t channels, Columns columns, S* panel, const PanelShape& shape) {
  const Packer<In, S> packer(kernels, grid, place, tensor + first * place.channel_step, channels, panel, shape);
  Gaps<S> gaps(kernels_of<S>(kernels), panel, shape, channels);
  auto visit = [&](const RunOfData& run) {
    gaps.fill_up_to(run.column);
    packer(run);
    gaps.skip_to(run.column + (run.rows - 1) * run.column_pitch + run.count * grid.lanes);
  };
  packer.takes_images() ? for_each_image(grid, place, columns, visit) : for_each_run(grid, place, columns, visit);
  gaps.fill_up_to(columns.end - columns.begin);
}

template <class S, class Out>
void unpack(const Kernels& kernels, const Grid& grid, const Placement& place, Out* tensor, int64_t first,
            int64_t channels, Columns columns, const S* panel, int64_t pitch) {
  const Movers<S, Out>& move = movers<S, Out>(kernels);
  const int64_t cs = place.channel_step, ls = place.lane_step, lanes = grid.lanes;
  tensor += first * cs;
  auto visit = [&](const RunOfData& run) {
    const S* src = panel + run.column;
    Out* dst = tensor + run.element;
    if (run.rows > 1) {
      move.planes(dst, {cs, run.element_pitch, run.step}, src, {pitch, run.column_pitch, 1},
                  {channels, run.rows, run.count, 0});
    } else if (lanes > 1) {
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
  };
  if (lanes == 1 && cs != 1 && place.step[3] == 1) {  // with a stride, a plane at a time is 10 % slower
    for_each_image(grid, place, columns, visit);
  } else {
    for_each_run(grid, place, columns, visit);
  }
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
