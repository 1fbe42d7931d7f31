// Mask producers over whole weights. Tiles and groups are independent: the result depends neither on the
// number of threads nor on what else is in the weight. Nothing here throws inside a parallel region.
#pragma once

#include "masks/planes.h"

namespace sparseprop::masks {

// The n largest of every m consecutive columns; ties go to the lowest column.
template <typename Score>
void nm_mask(const Problem<Score>& problem);

enum class Method { kExact, kGreedy, kGreedyFill };

struct TileOptions {
  Method method;
  bool at_most;  // kExact: at most n per row and column everywhere, instead of exactly n in whole tiles
  // kExact, not at_most, whole tiles only: (groups, tile rows, tile columns, positions, m) each; or both null.
  double* row_dual;
  double* col_dual;
};

// m x m tiles on the (row, column) plane. Incomplete tiles hold at most n per row and column.
template <typename Score>
void transposable_nm_mask(const Problem<Score>& problem, const TileOptions& options);

}  // namespace sparseprop::masks
