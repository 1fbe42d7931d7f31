#include "stream.h"

#include <algorithm>
#include <stdexcept>

namespace sparseprop {

Stream::Stream(const Entries& entries, const StreamShape& shape, std::vector<uint32_t>& canonical)
    : block_rows_(shape.block_rows),
      n_blocks_(std::max<int64_t>(1, (entries.panel_rows + shape.block_rows - 1) / shape.block_rows)) {
  offset_.reserve(entries.nnz());
  canonical.reserve(entries.value.size());
  cut_parts(entries, shape);
  for (const Part& part : parts_) add_part(entries, shape, part, canonical);
  nnz_ = static_cast<int64_t>(offset_.size());
  index_.push_back({0, 0, 0, static_cast<uint32_t>(nnz_)});
  segment_row_.resize(segment_row_.size() + kLookAhead);
  segment_value_.resize(segment_value_.size() + kLookAhead);
  offset_.push_back(0);
  for (auto* list : {&segment_row_, &segment_value_}) list->shrink_to_fit();
  runs_.shrink_to_fit();
}

// Equal work: a part closes when it has its share of non-zeros (a row counts a little too) or too many rows.
void Stream::cut_parts(const Entries& entries, const StreamShape& shape) {
  const int64_t rows = entries.rows, wanted = std::max(shape.min_parts, (rows + shape.part_rows - 1) / shape.part_rows);
  auto weight = [&](int64_t row) { return entries.row_start[row] + 2 * row; };
  const int64_t total = weight(rows);
  int64_t begin = 0;
  for (int64_t k = 1; begin < rows; ++k) {
    int64_t end = begin + shape.row_step;
    while (end < rows && end - begin < 2 * shape.part_rows && weight(end) * wanted < total * k) end += shape.row_step;
    end = std::min(end, rows);
    parts_.push_back({begin, end - begin});
    max_part_rows_ = std::max(max_part_rows_, end - begin);
    begin = end;
  }
}

void Stream::add_part(const Entries& entries, const StreamShape& shape, const Part& part, std::vector<uint32_t>& canonical) {
  struct Segment {
    uint32_t first, count, row;
    int64_t start;
  };
  std::vector<int64_t> cursor(entries.row_start.begin() + part.row, entries.row_start.begin() + part.row + part.rows);
  std::vector<Segment> segments;
  for (int64_t b = 0; b < n_blocks_; ++b) {
    const int64_t low = b * block_rows_, high = low + block_rows_;
    segments.clear();
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t start = cursor[r], begin = entries.row_start[part.row + r], end = entries.row_start[part.row + r + 1];
      int64_t stop = start;
      while (stop < end && entries.panel_row[stop] < high) ++stop;
      cursor[r] = stop;
      const bool empty_row = begin == end;
      if (stop > start || (empty_row && b == 0)) {
        segments.push_back({start == begin, static_cast<uint32_t>(stop - start), static_cast<uint32_t>(r), start});
      }
    }
    std::stable_sort(segments.begin(), segments.end(), [](const Segment& x, const Segment& y) {
      return x.first != y.first ? x.first > y.first : x.count < y.count;
    });
    Index index = {static_cast<uint32_t>(runs_.size()), 0, static_cast<uint32_t>(segment_row_.size()),
                   static_cast<uint32_t>(offset_.size())};
    for (const Segment& s : segments) {
      if (runs_.size() == index.run || runs_.back().count != s.count || runs_.back().first != s.first) {
        runs_.push_back({0, s.count, s.first});
      }
      ++runs_.back().rows;
      segment_row_.push_back(s.row);
      segment_value_.push_back(static_cast<uint32_t>(entries.value.empty() ? s.start : offset_.size()));
      for (int64_t k = s.start; k < s.start + s.count; ++k) {
        const int64_t at = (entries.panel_row[k] - low) * shape.row_pitch + entries.shift[k];
        if (at >> shape.unit_log2 > UINT16_MAX) throw std::length_error("this convolution has too many taps for the sparse kernels; keep the layer dense.");
        offset_.push_back(static_cast<uint16_t>(at >> shape.unit_log2));
        if (!entries.value.empty()) canonical.push_back(entries.value[k]);
      }
    }
    index.n_runs = static_cast<uint32_t>(runs_.size()) - index.run;
    index_.push_back(index);
  }
}

BlockStream Stream::block(int64_t part, int64_t block) const {
  const Index& i = index_[part * n_blocks_ + block];
  return {runs_.data() + i.run, i.n_runs, segment_row_.data() + i.segment, segment_value_.data() + i.segment,
          offset_.data() + i.nonzero};
}

int64_t Stream::storage_bytes() const {
  return static_cast<int64_t>(runs_.size() * sizeof(Run) + index_.size() * sizeof(Index) +
                              (segment_row_.size() + segment_value_.size()) * 4 + offset_.size() * 2);
}

}  // namespace sparseprop
