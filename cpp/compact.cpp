#include "compact.h"

#include <algorithm>

namespace sparseprop {

Grid compact_grid(int64_t batch, const Triple& size) {
  const Layer point = {1, 1, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}};
  return make_grid(point, {batch, size, {0, 0, 0}, size}, 1);
}

bool may_compact(const Layer& layer, const Grid& padded, bool forward) {
  return (forward || layer.stride == Triple{1, 1, 1}) && padded.lanes == 1 && padded.max_shift > 0;
}

Compact::Compact(const Grid& compact, const Grid& padded, const Triple& first, const CompactShape& shape) {
  const auto place = [&](int64_t column) {
    int64_t at = 0;
    for (int d = 0; d < 4; ++d) {
      at += (column / compact.pitch[d] + (d > 0 ? first[d - 1] : 0)) * padded.pitch[d];
      column %= compact.pitch[d];
    }
    return at;
  };
  const int64_t all = compact.columns, row = compact.extent[3];
  for (int64_t begin = 0; begin < all; begin += shape.chunk) {
    const int64_t end = std::min(begin + shape.chunk, all), origin = begin == 0 ? 0 : place(begin);
    chunks_.push_back({origin, end == all ? padded.columns : place(end)});
    for (int64_t tile = begin; tile < end; tile += shape.tile) {
      first_run_.push_back(static_cast<int64_t>(runs_.size()));
      const int64_t stop = std::min(tile + shape.tile, end);
      for (int64_t j = tile, count; j < stop; j += count) {
        count = std::min(row - j % row, stop - j);
        add(j - tile, place(j) - origin, count);
      }
      const int64_t rest = -(stop - tile) & (shape.lanes - 1);
      if (rest > 0) add(stop - tile, -1, rest);
    }
  }
  first_run_.push_back(static_cast<int64_t>(runs_.size()));
}

void Compact::add(int64_t to, int64_t from, int64_t count) {
  runs_.push_back({static_cast<int32_t>(to), static_cast<int32_t>(from), static_cast<int32_t>(count)});
}

int64_t Compact::most_padded() const {
  int64_t most = 0;
  for (const Range& chunk : chunks_) most = std::max(most, chunk.size());
  return most;
}

}  // namespace sparseprop
