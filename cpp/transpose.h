// Values and weight gradients of a dense enough pattern between the canonical order and that of a transposed stream, by
// tiles of 16 x 16 weights.
#pragma once
#include <cstdint>
#include <vector>

#include "entries.h"

namespace sparseprop {

class TileTranspose {
 public:
  // `canonical`: where in the canonical order the stream's non-zeros are. Rows of the stream are inputs, without shifts.
  TileTranspose(const Layer& layer, const PatternRef& pattern, const Stream& stream, const std::vector<uint32_t>& canonical);

  // Whether such a pattern has tiles, and is faster by them than one non-zero after the other.
  static bool suits(const Layer& layer, const Grid& grid, int64_t nnz);

  // Both as Exchange's.
  template <class S>
  void gather(const Kernels& table, S* out, const S* values, bool parallel) const;
  template <class S>
  void scatter(const Kernels& table, S* out, const S* dots, int64_t splits, bool parallel) const;

  int64_t storage_bytes() const;

 private:
  struct Band {
    int64_t row, rows, tile, row_start;  // where its own begin in the lists below
  };

  template <class Work>
  void for_bands(bool parallel, Work work) const;

  int64_t columns_ = 0, nnz_ = 0;
  std::vector<Band> bands_;
  std::vector<WeightTile> tiles_;    // of each band, column after column
  std::vector<uint32_t> row_start_;  // in canonical order, of each tile's 16 rows
};

}  // namespace sparseprop
