// A layer's pattern as its owner holds it, and the entries of each direction of the contraction.
#pragma once
#include "lowering.h"
#include "stream.h"

namespace sparseprop {

struct PatternRef {
  const int64_t* row_ptr;  // out_channels + 1
  const int32_t* col_idx;  // nnz, increasing inside a row
  int64_t nnz;
};

// Throws std::invalid_argument for indices that no pattern has.
void check_indices(const Layer& layer, const PatternRef& pattern);
Entries forward_entries(const Layer& layer, const PatternRef& pattern, const std::vector<Tap>& taps, int64_t phases);
// `taps`: where each finds the columns of grad_out.
Entries backward_entries(const Layer& layer, const PatternRef& pattern, const Grid& grid, const std::vector<Tap>& taps);

}  // namespace sparseprop
