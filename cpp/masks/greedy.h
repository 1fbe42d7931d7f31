// The 2-approximation: heaviest first, kept if its row and its column still have room; optionally completed.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparseprop::masks {

template <int Cap>
class GreedySolver {
 public:
  double scores[Cap * Cap];      // in: row-major, row stride cols
  std::uint8_t keep[Cap * Cap];  // out

  // At most n per row and column, and no further entry fits. Ties go to the lowest flat index.
  void solve(int rows, int cols, int n) {
    rows_ = rows, cols_ = cols, n_ = n;
    const int cells = rows * cols;
    for (int c = 0; c < cells; ++c) order_[c] = {scores[c], c};
    std::sort(order_, order_ + cells, [](const Entry& x, const Entry& y) {
      return x.score != y.score ? x.score > y.score : x.cell < y.cell;
    });
    std::fill_n(row_count_, rows, 0);
    std::fill_n(col_count_, cols, 0);
    std::fill_n(keep, cells, std::uint8_t{0});
    for (int k = 0; k < cells; ++k) {
      const int i = order_[k].cell / cols;
      const int j = order_[k].cell % cols;
      if (row_count_[i] < n && col_count_[j] < n) put(i, j);
    }
  }

  // After solve on a square tile: exactly n in every row and column.
  void fill() {
    for (;;) {
      const int i = first_deficit(row_count_, rows_);
      if (i == rows_) return;
      if (!add_best()) exchange(i, first_deficit(col_count_, cols_));
    }
  }

 private:
  struct Entry {
    double score;
    int cell;
  };
  Entry order_[Cap * Cap];
  int row_count_[Cap];
  int col_count_[Cap];
  int rows_ = 0, cols_ = 0, n_ = 0;

  std::uint8_t& kept(int i, int j) { return keep[i * cols_ + j]; }
  double score(int i, int j) const { return scores[i * cols_ + j]; }

  void put(int i, int j) {
    kept(i, j) = 1;
    ++row_count_[i];
    ++col_count_[j];
  }

  int first_deficit(const int* count, int size) const {
    return static_cast<int>(std::find_if(count, count + size, [this](int c) { return c < n_; }) - count);
  }

  bool add_best() {
    int best_i = -1, best_j = -1;
    for (int i = 0; i < rows_; ++i) {
      if (row_count_[i] >= n_) continue;
      for (int j = 0; j < cols_; ++j) {
        if (col_count_[j] >= n_ || kept(i, j)) continue;
        if (best_i < 0 || score(i, j) > score(best_i, best_j)) best_i = i, best_j = j;
      }
    }
    if (best_i < 0) return false;
    put(best_i, best_j);
    return true;
  }

  // Where no entry can be added, some kept (p, q) can give way to (i, q) and (p, j): if none could, every row
  // without column j would have all its entries in the columns of row i, fewer than n, so would be addable.
  void exchange(int i, int j) {
    int best_p = -1, best_q = -1;
    double best = 0.0;
    for (int p = 0; p < rows_; ++p) {
      if (kept(p, j)) continue;
      for (int q = 0; q < cols_; ++q) {
        if (!kept(p, q) || kept(i, q)) continue;
        const double gain = score(i, q) + score(p, j) - score(p, q);
        if (best_p < 0 || gain > best) best = gain, best_p = p, best_q = q;
      }
    }
    kept(best_p, best_q) = 0;
    kept(i, best_q) = 1;
    kept(best_p, j) = 1;
    ++row_count_[i];
    ++col_count_[j];
  }
};

}  // namespace sparseprop::masks
