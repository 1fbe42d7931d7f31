// Values and weight gradients between the canonical order, which the optimizer sees, and the order of a transposed stream.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "entries.h"
#include "range.h"
#include "transpose.h"

namespace sparseprop {

// Dense enough patterns of one tap and group are transposed by their bits; others move one non-zero after the other, tile by
// tile, so that what is visited in random order stays in a cache, and one of the two orders is walked in runs.
class Exchange {
 public:
  Exchange() = default;
  // `canonical`: where in the canonical order the stream's non-zeros are.
  Exchange(const Layer& layer, const Grid& grid, const PatternRef& pattern, const Stream& stream,
           const std::vector<uint32_t>& canonical, int64_t element_size);

  // The values in the order of the stream.
  template <class S>
  void gather(const Kernels& table, S* out, const S* values, bool parallel) const;

  // Weight gradients in canonical order: the sum of `splits` arrays in the order of the stream, one behind the other. May
  // read as far as 64 bytes behind the last.
  template <class S>
  void scatter(const Kernels& table, S* out, const S* dots, int64_t splits, bool parallel) const;

  int64_t storage_bytes() const;

 private:
  // Neighbours in one of the two orders.
  struct Run {
    uint32_t begin, count;
  };
  struct Tile {
    uint32_t run, ahead, other;  // where its own begin in the lists below
  };

  void add_stream_tiles(const Stream& stream, const std::vector<uint32_t>& canonical, int64_t block, Range window,
                        int64_t element_size);
  void add_row_tiles(const PatternRef& pattern, const std::vector<uint32_t>& position, Range window, int64_t columns,
                     int64_t ranges);
  void add_run(int64_t begin, int64_t count, const uint32_t* other);
  void add_ahead(std::vector<uint32_t>& places);
  void begin_tile();

  template <class Ask, class Move>
  void for_tiles(bool parallel, Ask ask, Move move) const;
  template <int fixed, class S>
  void scatter_of(S* out, const S* dots, int64_t splits, bool parallel) const;

  std::optional<TileTranspose> by_bits_;  // instead of all below
  bool by_rows_ = false;         // the canonical order is walked, else the stream
  std::vector<Tile> tiles_;      // one more than there are tiles
  std::vector<Run> runs_;        // in the order that is walked
  std::vector<Run> ahead_;       // in the other order, to be asked for before a tile
  std::vector<uint32_t> other_;  // position in the other order, run after run
};

}  // namespace sparseprop
