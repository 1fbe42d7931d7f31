// From the canonical pattern (rows of sorted flat weight columns) to the entries of one direction.
#include "entries.h"

#include <numeric>
#include <stdexcept>
#include <string>

namespace sparseprop {

void check_indices(const Layer& layer, const PatternRef& pattern) {
  auto fail = [](const std::string& what) { throw std::invalid_argument("Sparsity pattern refused: " + what); };
  if (pattern.nnz >= int64_t{0xffffffff}) fail("more than 2^32 - 1 non-zeros in one layer.");
  if (pattern.row_ptr[0] != 0 || pattern.row_ptr[layer.out_channels] != pattern.nnz) {
    fail("row_ptr must run from 0 to nnz = " + std::to_string(pattern.nnz) + ".");
  }
  const int64_t columns = layer.row_size();
  for (int64_t r = 0; r < layer.out_channels; ++r) {
    const int64_t begin = pattern.row_ptr[r], end = pattern.row_ptr[r + 1];
    if (begin > end || end > pattern.nnz) fail("row_ptr decreases at row " + std::to_string(r) + ".");
    for (int64_t k = begin; k < end; ++k) {
      if (pattern.col_idx[k] < 0 || pattern.col_idx[k] >= columns) {
        fail("column " + std::to_string(pattern.col_idx[k]) + " in row " + std::to_string(r) + " is outside 0 .. " +
             std::to_string(columns - 1) + ".");
      }
      if (k > begin && pattern.col_idx[k] <= pattern.col_idx[k - 1]) fail("columns of row " + std::to_string(r) + " are not increasing.");
    }
  }
}

Entries forward_entries(const Layer& layer, const PatternRef& pattern, const std::vector<Tap>& taps, int64_t phases) {
  const int64_t n_taps = layer.taps();
  const int64_t group_in = layer.in_channels / layer.groups, group_out = layer.out_channels / layer.groups;
  Entries e;
  e.rows = layer.out_channels;
  e.panel_rows = layer.in_channels * phases;
  e.row_start.assign(pattern.row_ptr, pattern.row_ptr + e.rows + 1);
  e.panel_row.resize(pattern.nnz);
  e.shift.resize(pattern.nnz);
  for (int64_t r = 0; r < e.rows; ++r) {
    const int64_t first_channel = r / group_out * group_in;
    for (int64_t k = pattern.row_ptr[r]; k < pattern.row_ptr[r + 1]; ++k) {
      const Tap& tap = taps[pattern.col_idx[k] % n_taps];
      e.panel_row[k] = static_cast<uint32_t>((first_channel + pattern.col_idx[k] / n_taps) * phases + tap.phase);
      e.shift[k] = static_cast<uint32_t>(tap.shift);
    }
  }
  return e;
}

// The transposed pattern by a counting sort: rows are (input channel, phase), panel rows output channels.
Entries backward_entries(const Layer& layer, const PatternRef& pattern, const Grid& grid, const std::vector<Tap>& taps) {
  const Entries f = forward_entries(layer, pattern, make_taps(layer, grid), static_cast<int64_t>(grid.phases.size()));
  Entries e;
  e.rows = f.panel_rows;
  e.panel_rows = f.rows;
  e.row_start.assign(e.rows + 1, 0);
  for (const uint32_t row : f.panel_row) ++e.row_start[row + 1];
  std::partial_sum(e.row_start.begin(), e.row_start.end(), e.row_start.begin());
  std::vector<int64_t> next(e.row_start.begin(), e.row_start.end() - 1);
  e.panel_row.resize(pattern.nnz);
  e.shift.resize(pattern.nnz);
  e.value.resize(pattern.nnz);
  for (int64_t r = 0; r < f.rows; ++r) {
    for (int64_t k = f.row_start[r]; k < f.row_start[r + 1]; ++k) {
      const int64_t to = next[f.panel_row[k]]++;
      e.panel_row[to] = static_cast<uint32_t>(r);
      e.shift[to] = static_cast<uint32_t>(taps[pattern.col_idx[k] % layer.taps()].shift);
      e.value[to] = static_cast<uint32_t>(k);
    }
  }
  return e;
}

}  // namespace sparseprop
