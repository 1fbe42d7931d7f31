// Columns without a halo: of layers whose planes are so small that their zero padding is much of the padded grid (a
// quarter at 7x7, an eighth at 14x14). What each tap reads is copied out of the padded panel, so that outputs, and backward
// inputs and their gradients, have columns of their own.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "lowering.h"
#include "range.h"

namespace sparseprop {

struct CompactShape {
  int64_t tile, chunk, lanes;  // columns of each; vectors of `lanes` are what kernels see
};

class Compact {
 public:
  Compact() = default;
  // `first`: the padded grid's coordinates of the first of the layer's rows, each of the extent of `compact`.
  Compact(const Grid& compact, const Grid& padded, const Triple& first, const CompactShape& shape);

  bool used() const { return !chunks_.empty(); }
  // Columns of the padded grid that belong to a chunk: its own and halo, so that chunks cover the grid.
  Range padded(int64_t chunk) const { return chunks_[chunk]; }
  // Where a tile's columns lie behind the first of `padded`.
  const ColumnRun* runs(int64_t tile) const { return runs_.data() + first_run_[tile]; }
  int64_t n_runs(int64_t tile) const { return first_run_[tile + 1] - first_run_[tile]; }
  int64_t most_padded() const;

 private:
  void add(int64_t to, int64_t from, int64_t count);

  std::vector<Range> chunks_;
  std::vector<ColumnRun> runs_;
  std::vector<int64_t> first_run_;  // one more than there are tiles
};

// Grid of the positions in `size` alone.
Grid compact_grid(int64_t batch, const Triple& size);
// Whether the layer's columns have a halo that can go: not from inputs that a stride splits up.
bool may_compact(const Layer& layer, const Grid& padded, bool forward);

}  // namespace sparseprop
