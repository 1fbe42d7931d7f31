#include "transpose.h"

#include <algorithm>

#include "run.h"

namespace sparseprop {
namespace {

constexpr int64_t kSide = WeightTile::side, kBand = WeightTiles::most_rows * kSide;
// Bound by memory, of which bits take 1 byte a non-zero at 50 % density and positions 4: a backward pass 4 to 20 % faster
// there, even at 35 %, 5 % slower at 25 %, with vectors of 8 as well.
constexpr double kDensity = 0.35;

}  // namespace

bool TileTranspose::suits(const Layer& layer, const Grid& grid, int64_t nnz) {
  const double weights = double(layer.in_channels) * double(layer.out_channels);
  return layer.taps() == 1 && layer.groups == 1 && grid.phases.size() == 1 && weights > 0 && double(nnz) >= kDensity * weights;
}

// No band spans two blocks of the stream, so that a column's non-zeros in a tile lie side by side in both orders.
TileTranspose::TileTranspose(const Layer& layer, const PatternRef& pattern, const Stream& stream,
                             const std::vector<uint32_t>& canonical)
    : columns_(ceil_div(layer.in_channels, kSide)), nnz_(pattern.nnz) {
  const int64_t rows = layer.out_channels;
  std::vector<uint32_t> row_of(nnz_), band_of(rows);
  for (int64_t b = 0; b < stream.blocks(); ++b) {
    const int64_t end = std::min(rows, stream.panel_row(b + 1));
    for (int64_t row = stream.panel_row(b); row < end; row += kBand) {
      const int64_t here = std::min(kBand, end - row), tiles = ceil_div(here, kSide);
      bands_.push_back({row, tiles, static_cast<int64_t>(tiles_.size()), static_cast<int64_t>(row_start_.size())});
      tiles_.resize(tiles_.size() + tiles * columns_);
      for (int64_t r = row; r < row + tiles * kSide; ++r) {
        row_start_.push_back(static_cast<uint32_t>(pattern.row_ptr[std::min(r, row + here)]));
        if (r < row + here) band_of[r] = static_cast<uint32_t>(bands_.size() - 1);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(row_of.begin() + pattern.row_ptr[r], row_of.begin() + pattern.row_ptr[r + 1], static_cast<uint32_t>(r));
  }
  for (int64_t at = 0; at < nnz_; ++at) {
    const uint32_t k = canonical[at];
    const int64_t row = row_of[k], column = pattern.col_idx[k];
    const Band& band = bands_[band_of[row]];
    const int64_t i = (row - band.row) % kSide, j = column % kSide;
    WeightTile& tile = tiles_[band.tile + column / kSide * band.rows + (row - band.row) / kSide];
    if (tile.column[j] == 0) tile.place[j] = static_cast<uint32_t>(at);
    tile.row[i] = static_cast<uint16_t>(tile.row[i] | 1u << j);
    tile.column[j] = static_cast<uint16_t>(tile.column[j] | 1u << i);
  }
}

template <class Work>
void TileTranspose::for_bands(bool parallel, Work work) const {
  run_each(static_cast<int64_t>(bands_.size()), parallel && nnz_ >= kSerial, [&](int64_t i) {
    const Band& b = bands_[i];
    work(WeightTiles{tiles_.data() + b.tile, columns_, b.rows, row_start_.data() + b.row_start});
  });
}

template <class S>
void TileTranspose::gather(const Kernels& table, S* out, const S* values, bool parallel) const {
  for_bands(parallel, [&](const WeightTiles& tiles) { kernels_of<S>(table).gather(tiles, out, values, nnz_); });
}

template <class S>
void TileTranspose::scatter(const Kernels& table, S* out, const S* dots, int64_t splits, bool parallel) const {
  for_bands(parallel, [&](const WeightTiles& tiles) { kernels_of<S>(table).scatter(tiles, out, dots, splits, nnz_); });
}

int64_t TileTranspose::storage_bytes() const {
  return static_cast<int64_t>(bands_.size() * sizeof(Band) + tiles_.size() * sizeof(WeightTile) + row_start_.size() * 4);
}

template void TileTranspose::gather(const Kernels&, float*, const float*, bool) const;
template void TileTranspose::gather(const Kernels&, double*, const double*, bool) const;
template void TileTranspose::scatter(const Kernels&, float*, const float*, int64_t, bool) const;
template void TileTranspose::scatter(const Kernels&, double*, const double*, int64_t, bool) const;

}  // namespace sparseprop
