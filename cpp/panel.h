// Packing: any strided tensor onto a panel of the grid and back. This is the only place that knows memory layouts
// (NCHW, channels_last, batch-last, row- or feature-major, expanded), and where bfloat16 becomes float32.
#pragma once
#include "kernels.h"
#include "lowering.h"
#include "runs.h"

namespace sparseprop {

// Column j of row r lives at r * row_pitch + (j / tile) * tile_pitch + j % tile.
struct PanelShape {
  int64_t row_pitch, tile, tile_pitch;
  int64_t at(int64_t column) const { return column / tile * tile_pitch + column % tile; }
};

// panel[channel, columns] = tensor (or 0 where the grid holds no data), for channels [first, first + channels).
template <class In, class S>
void pack(const Kernels& kernels, const Grid& grid, const Placement& place, const In* tensor, int64_t first,
          int64_t channels, Columns columns, S* panel, const PanelShape& shape);

// tensor = panel[channel, columns] wherever the grid holds data. `panel` rows are contiguous (tile_pitch == tile).
template <class S, class Out>
void unpack(const Kernels& kernels, const Grid& grid, const Placement& place, Out* tensor, int64_t first,
            int64_t channels, Columns columns, const S* panel, int64_t row_pitch);

}  // namespace sparseprop
