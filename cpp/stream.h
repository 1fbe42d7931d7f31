// A sparsity pattern as the kernels want it: cut into parts of rows (one output tile each stays in L2) and blocks of
// panel rows (one input slab each stays in L1), rows inside sorted by their count so that loops have constant trip
// counts. Values are not copied: segments point into the array that the optimizer updates.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "range.h"

namespace sparseprop {

// One direction of the contraction in row order; entries of a row sorted by panel row.
struct Entries {
  int64_t rows, panel_rows;
  std::vector<int64_t> row_start;   // rows + 1
  std::vector<uint32_t> panel_row;  // per entry
  std::vector<uint32_t> shift;      // per entry, in columns
  std::vector<uint32_t> value;      // position in the canonical values; empty: the entry's own position

  int64_t nnz() const { return row_start.back(); }
};

struct StreamShape {
  int64_t part_rows;     // aimed at, per part
  int64_t row_step;      // parts start at multiples of this
  int64_t block_rows;    // panel rows per block, or channels where their shifted copies are read
  int64_t row_pitch;     // columns between panel rows
  unsigned unit_log2;    // offsets are stored >> unit_log2
  int64_t min_parts;
};

class Stream {
 public:
  // Of transposed entries also the canonical position of each non-zero, in the order of the stream.
  Stream(const Entries& entries, const StreamShape& shape, std::vector<uint32_t>& canonical);

  struct Part {
    int64_t row, rows;
  };

  const std::vector<Part>& parts() const { return parts_; }
  int64_t blocks() const { return n_blocks_; }
  int64_t max_part_rows() const { return max_part_rows_; }
  int64_t nnz() const { return nnz_; }
  // The first row of a block, in what its shape counts.
  int64_t panel_row(int64_t block) const { return block * block_rows_; }
  BlockStream block(int64_t part, int64_t block) const;
  Range nonzeros(int64_t part, int64_t block) const {
    const Index* i = &index_[part * n_blocks_ + block];
    return {i[0].nonzero, i[1].nonzero};
  }
  int64_t storage_bytes() const;

 private:
  struct Index {
    uint32_t run, n_runs;
    uint32_t segment;
    uint32_t nonzero;
  };

  void cut_parts(const Entries& entries, const StreamShape& shape);
  void add_part(const Entries& entries, const StreamShape& shape, const Part& part, std::vector<uint32_t>& canonical);

  int64_t block_rows_, n_blocks_, max_part_rows_ = 0, nnz_ = 0;
  std::vector<Part> parts_;
  std::vector<Index> index_;  // one more than there are blocks of parts
  std::vector<Run> runs_;
  std::vector<uint32_t> segment_row_, segment_value_;
  std::vector<uint16_t> offset_;
};

}  // namespace sparseprop
