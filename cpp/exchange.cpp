#include "exchange.h"

#include <algorithm>

#include "team.h"

namespace sparseprop {
namespace {

constexpr int64_t kTasks = 8;                   // at least, where there are as many parts or columns
constexpr int64_t kWindow = int64_t{256} << 10;  // bytes of canonical values that stay in L2 meanwhile
constexpr int64_t kRowTile = 12 * 1024;          // bytes of a tile's values that stay in L1
constexpr int64_t kLine = 64;
constexpr int64_t kSets = 64, kWays = 12;        // of L1, on CPUs since 2019 or so; older ones have 8 ways
constexpr uint32_t kGap = 16;                    // non-zeros between which lines are asked for as well

template <int write, class S>
void ask(const S* first, uint32_t count) {
  const auto step = static_cast<uint32_t>(kLine / sizeof(S));
  for (uint32_t i = 0; i < count; i += step) __builtin_prefetch(first + i, write);
}

// Rows that begin in few of L1's sets, as equal counts of 2^n non-zeros do, push each other out when a part of the columns
// is visited in the order of the stream: a backward pass of 2:4 with 512 non-zeros a row took a fifth longer.
bool collide(const PatternRef& pattern, Range rows, int64_t parts, int64_t element_size) {
  bool seen[kSets] = {};
  int64_t sets = 0;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    bool& set = seen[pattern.row_ptr[r] * element_size / kLine % kSets];
    sets += !set;
    set = true;
  }
  const int64_t bytes = (pattern.row_ptr[rows.end] - pattern.row_ptr[rows.begin]) * element_size;
  const int64_t lines = 1 + bytes / std::max<int64_t>(1, rows.size() * parts * kLine);  // of a row, in a part
  return rows.size() * lines > kWays * std::min(kSets, sets * lines);
}

}  // namespace

// A block of the stream holds a window of the canonical order: a range of its rows.
Exchange::Exchange(const Layer& layer, const Grid& grid, const PatternRef& pattern, const Stream& stream,
                   const std::vector<uint32_t>& canonical, int64_t element_size) {
  if (TileTranspose::suits(layer, grid, pattern.nnz)) {
    by_bits_.emplace(layer, pattern, stream, canonical);
    return;
  }
  const int64_t rows = layer.out_channels, blocks = stream.blocks();
  auto rows_of = [&](int64_t b) { return Range{std::min(rows, stream.panel_row(b)), std::min(rows, stream.panel_row(b + 1))}; };
  by_rows_ = collide(pattern, rows_of(0), static_cast<int64_t>(stream.parts().size()), element_size);
  other_.reserve(canonical.size());
  std::vector<uint32_t> position(by_rows_ ? canonical.size() : 0);
  for (size_t k = 0; k < position.size(); ++k) position[canonical[k]] = static_cast<uint32_t>(k);
  for (int64_t b = 0; b < blocks; ++b) {
    const Range window = {pattern.row_ptr[rows_of(b).begin], pattern.row_ptr[rows_of(b).end]};
    const int64_t bytes = window.size() * element_size;
    if (by_rows_) {
      const int64_t ranges = std::max((bytes + kRowTile - 1) / kRowTile, kTasks / blocks);
      add_row_tiles(pattern, position, window, layer.row_size(), std::clamp<int64_t>(ranges, 1, layer.row_size()));
    } else {
      add_stream_tiles(stream, canonical, b, window, element_size);
    }
  }
  begin_tile();
}

void Exchange::begin_tile() {
  tiles_.push_back({static_cast<uint32_t>(runs_.size()), static_cast<uint32_t>(ahead_.size()), static_cast<uint32_t>(other_.size())});
}

void Exchange::add_run(int64_t begin, int64_t count, const uint32_t* other) {
  runs_.push_back({static_cast<uint32_t>(begin), static_cast<uint32_t>(count)});
  other_.insert(other_.end(), other, other + count);
}

// The stream's parts, one after the other, and the whole window asked for before the first: part by part, lines came from
// memory one at a time (5 to 18 % of a backward pass).
void Exchange::add_stream_tiles(const Stream& stream, const std::vector<uint32_t>& canonical, int64_t block, Range window,
                                int64_t element_size) {
  const int64_t parts = static_cast<int64_t>(stream.parts().size());
  const int64_t cuts = std::max<int64_t>(1, std::min(kTasks / stream.blocks(), parts));
  for (int64_t c = 0; c < cuts; ++c) {
    begin_tile();
    const Range range = share(parts, cuts, c);
    for (int64_t p = range.begin; p < range.end; ++p) {
      const Range run = stream.nonzeros(p, block);
      add_run(run.begin, run.size(), canonical.data() + run.begin);
    }
    if (window.size() * element_size <= kWindow) ahead_.push_back({static_cast<uint32_t>(window.begin), static_cast<uint32_t>(window.size())});
  }
}

// The window's rows in ranges of columns, each row's share of a range a run.
void Exchange::add_row_tiles(const PatternRef& pattern, const std::vector<uint32_t>& position, Range window, int64_t columns,
                             int64_t ranges) {
  std::vector<std::vector<uint32_t>> members(ranges);
  for (int64_t k = window.begin; k < window.end; ++k) members[pattern.col_idx[k] * ranges / columns].push_back(static_cast<uint32_t>(k));
  for (const std::vector<uint32_t>& range : members) {
    begin_tile();
    std::vector<uint32_t> places;
    for (const uint32_t k : range) places.push_back(position[k]);
    for (size_t i = 0, n = 1; i < range.size(); i += n, n = 1) {
      while (i + n < range.size() && range[i + n] == range[i] + n) ++n;
      add_run(range[i], n, places.data() + i);
    }
    add_ahead(places);
  }
}

// Asked for are the lines of these places.
void Exchange::add_ahead(std::vector<uint32_t>& places) {
  std::sort(places.begin(), places.end());
  for (size_t i = 0, begin = 0; i < places.size(); ++i) {
    if (i + 1 < places.size() && places[i + 1] - places[i] < kGap) continue;
    ahead_.push_back({places[begin], places[i] + 1 - places[begin]});
    begin = i + 1;
  }
}

// move(run, its first other position) for each run of a tile, after ask(run) for all that it visits.
template <class Ask, class Move>
void Exchange::for_tiles(bool parallel, Ask ask, Move move) const {
  const int64_t tiles = static_cast<int64_t>(tiles_.size()) - 1;
  run_each(tiles, parallel && static_cast<int64_t>(other_.size()) >= kSerial, [&](int64_t t) {
    const Tile &tile = tiles_[t], &next = tiles_[t + 1];
    for (uint32_t l = tile.ahead; l < next.ahead; ++l) ask(ahead_[l]);
    const uint32_t* other = other_.data() + tile.other;
    for (uint32_t r = tile.run; r < next.run; ++r) {
      move(runs_[r], other);
      other += runs_[r].count;
    }
  });
}

template <class S>
void Exchange::gather(const Kernels& table, S* out, const S* values, bool parallel) const {
  if (by_bits_) return by_bits_->gather(table, out, values, parallel);
  if (by_rows_) {
    for_tiles(parallel, [=](Run places) { ask<1>(out + places.begin, places.count); }, [=](Run run, const uint32_t* other) {
      const S* from = values + run.begin;
      for (uint32_t i = 0; i < run.count; ++i) out[other[i]] = from[i];
    });
  } else {
    for_tiles(parallel, [=](Run places) { ask<0>(values + places.begin, places.count); }, [=](Run run, const uint32_t* other) {
      S* to = out + run.begin;
      for (uint32_t i = 0; i < run.count; ++i) to[i] = values[other[i]];
    });
  }
}

template <class S>
void Exchange::scatter(const Kernels& table, S* out, const S* dots, int64_t splits, bool parallel) const {
  if (by_bits_) return by_bits_->scatter(table, out, dots, splits, parallel);
  switch (splits) {
    case 1: return scatter_of<1>(out, dots, splits, parallel);
    case 2: return scatter_of<2>(out, dots, splits, parallel);
    default: return scatter_of<0>(out, dots, splits, parallel);
  }
}

// `fixed` is `splits`, known at compile time, or 0: many splits have many columns, beside which an exchange is short.
template <int fixed, class S>
void Exchange::scatter_of(S* out, const S* dots, int64_t splits, bool parallel) const {
  const int64_t n = fixed > 0 ? fixed : splits, nnz = static_cast<int64_t>(other_.size());
  auto sum = [=](const S* dot) __attribute__((always_inline)) {
    S total = *dot;
    for (int64_t s = 1; s < (fixed > 0 ? fixed : n); ++s) total += dot[s * nnz];
    return total;
  };
  if (by_rows_) {
    auto all_splits = [=](Run places) {
      for (int64_t s = 0; s < n; ++s) ask<0>(dots + s * nnz + places.begin, places.count);
    };
    for_tiles(parallel, all_splits, [=](Run run, const uint32_t* other) {
      S* to = out + run.begin;
      for (uint32_t i = 0; i < run.count; ++i) to[i] = sum(dots + other[i]);
    });
  } else {
    for_tiles(parallel, [=](Run places) { ask<1>(out + places.begin, places.count); }, [=](Run run, const uint32_t* other) {
      const S* from = dots + run.begin;
      for (uint32_t i = 0; i < run.count; ++i) out[other[i]] = sum(from + i);
    });
  }
}

int64_t Exchange::storage_bytes() const {
  return static_cast<int64_t>(tiles_.size() * sizeof(Tile) + (runs_.size() + ahead_.size()) * sizeof(Run) + other_.size() * 4) +
         (by_bits_ ? by_bits_->storage_bytes() : 0);
}

template void Exchange::gather(const Kernels&, float*, const float*, bool) const;
template void Exchange::gather(const Kernels&, double*, const double*, bool) const;
template void Exchange::scatter(const Kernels&, float*, const float*, int64_t, bool) const;
template void Exchange::scatter(const Kernels&, double*, const double*, int64_t, bool) const;

}  // namespace sparseprop
