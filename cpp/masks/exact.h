// The best mask of one tile with exactly n kept in every row and every column, with its dual certificate.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace sparseprop::masks {

// Two lanes, so that the search runs on vectors even where loops with conditional stores are left scalar.
using Doubles = double __attribute__((vector_size(16)));
using Integers = std::int64_t __attribute__((vector_size(16)));
inline constexpr int kLanes = 2;

template <typename Vector = Doubles, typename T>
inline Vector load_lanes(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename Vector, typename T>
inline void store_lanes(Vector v, T* to) {
  std::memcpy(to, &v, sizeof v);
}

// A closed node is never nearer than its distance, so it needs no test. Lengths below 0 are rounding.
inline void relax(Doubles length, double dist, std::int64_t from, double* to, double* key, std::int64_t* parent) {
  const Doubles zero = {};
  const Doubles through = (length > zero ? length : zero) + dist;
  const Doubles old = load_lanes(to);
  const Integers nearer = through < old;
  store_lanes(nearer ? through : old, to);
  store_lanes(nearer ? through : load_lanes(key), key);
  store_lanes(nearer ? Integers{} + from : load_lanes<Integers>(parent), parent);
}

// The lowest key; ties go to the lowest node.
class Nearest {
 public:
  void scan(const double* keys, int size, int first) {
    Integers index = {first, first + 1};
    for (int k = 0; k < size; k += kLanes, index += kLanes) {
      Doubles key = load_lanes(keys + k);
      if (k + 1 == size) key[1] = std::numeric_limits<double>::infinity();  // an odd side ends in padding
      const Integers less = key < best_;
      best_ = less ? key : best_;
      node_ = less ? index : node_;
    }
  }
  int node() const {
    const bool second = best_[1] < best_[0] || (best_[1] == best_[0] && node_[1] < node_[0]);
    return static_cast<int>(node_[second ? 1 : 0]);
  }

 private:
  Doubles best_ = Doubles{} + std::numeric_limits<double>::infinity();
  Integers node_ = {};
};

// Row-wise top-n is optimal without the column constraints. Its surplus columns are then relieved one unit at
// a time along shortest paths of the residual graph, which keeps the potentials dual feasible throughout.
// Fixed: the side is Cap, known to the compiler. Otherwise the side is any number up to Cap.
template <int Cap, bool Fixed>
class ExactSolver {
  static_assert(Cap % kLanes == 0, "an odd side needs room for its padding");

 public:
  alignas(64) double scores[Cap * Cap];      // in: row-major, row stride side()
  alignas(64) std::uint8_t keep[Cap * Cap];  // out
  // out: keep => score >= row + column, not kept => score <= row + column (up to rounding)
  double row_dual[Cap];
  double col_dual[Cap];

  void set_side(int side) { side_ = side; }
  int side() const { return Fixed ? Cap : side_; }

  void solve(int n) {
    n_ = n;
    select_rows();
    fill_arcs();
    while (has_surplus()) augment();
    for (int j = 0; j < side(); ++j) col_dual[j] = -price_[j];
  }

 private:
  static constexpr double kInf = std::numeric_limits<double>::infinity();

  int side_ = Cap;
  int n_ = 0;
  // Arc lengths without potentials; an infinity marks an absent arc, so the loops below need no branch.
  alignas(64) double unkeep_[Cap * Cap];  // [column][row]: score if kept, else +inf
  alignas(64) double add_[Cap * Cap];     // [row][column]: score if not kept, else -inf
  alignas(64) double price_[Cap];
  alignas(64) double col_dist_[Cap];
  alignas(64) double row_dist_[Cap];
  alignas(64) double col_key_[Cap];  // distance while open, +inf once closed
  alignas(64) double row_key_[Cap];
  alignas(64) std::int64_t col_parent_[Cap];  // the row before this column on its path
  alignas(64) std::int64_t row_parent_[Cap];
  int col_count_[Cap];

  void select_rows() {
    const int m = side();
    std::fill_n(col_count_, m, 0);
    for (int i = 0; i < m; ++i) {
      const double* a = scores + i * m;
      std::uint8_t* k = keep + i * m;
      if (std::all_of(a, a + m, [a](double x) { return x == a[0]; })) {
        // any n will do; a circulant spreads equal rows over all columns
        for (int j = 0; j < m; ++j) k[j] = (j - i + m) % m < n_;
        row_dual[i] = a[0];
      } else {
        row_dual[i] = top_n(a, k);
      }
      for (int j = 0; j < m; ++j) col_count_[j] += k[j];
    }
    std::fill_n(price_, m, 0.0);
  }

  // Ties go to the lowest index. Returns the n-th largest score.
  double top_n(const double* a, std::uint8_t* k) const {
    const int m = side();
    double threshold = 0.0;
    for (int j = 0; j < m; ++j) {
      int rank = 0;
      for (int l = 0; l < j; ++l) rank += a[l] >= a[j];
      for (int l = j + 1; l < m; ++l) rank += a[l] > a[j];
      k[j] = rank < n_;
      if (rank == n_ - 1) threshold = a[j];
    }
    return threshold;
  }

  void fill_arcs() {
    for (int i = 0; i < side(); ++i)
      for (int j = 0; j < side(); ++j) set_arc(i, j);
  }

  void set_arc(int i, int j) {
    const int m = side();
    const double a = scores[i * m + j];
    const bool kept = keep[i * m + j] != 0;
    unkeep_[j * m + i] = kept ? a : kInf;
    add_[i * m + j] = kept ? -kInf : a;
  }

  bool has_surplus() const {
    return std::any_of(col_count_, col_count_ + side(), [this](int c) { return c > n_; });
  }

  // One Dijkstra from all surplus columns to the nearest deficit column, then the flip along its path.
  void augment() {
    start();
    int target = -1;
    while (target < 0) target = pop();
    const double reach = col_dist_[target];
    for (int i = 0; i < side(); ++i) row_dual[i] += std::min(row_dist_[i], reach);
    for (int j = 0; j < side(); ++j) price_[j] += std::min(col_dist_[j], reach);
    flip(target);
  }

  void start() {
    const int m = side();
    for (int j = 0; j < m; ++j) {
      col_dist_[j] = col_key_[j] = row_dist_[j] = row_key_[j] = kInf;
      col_parent_[j] = row_parent_[j] = -1;
    }
    for (int j = 0; j < m; ++j) {
      if (col_count_[j] <= n_) continue;
      col_dist_[j] = 0.0;
      relax_rows(j, 0.0);
    }
  }

  // Closes the nearest open node; returns it if it is a deficit column, -1 otherwise.
  int pop() {
    const int m = side();
    Nearest nearest;
    nearest.scan(col_key_, m, 0);
    nearest.scan(row_key_, m, m);
    const int node = nearest.node();
    if (node >= m) {
      row_key_[node - m] = kInf;
      relax_cols(node - m, row_dist_[node - m]);
      return -1;
    }
    if (col_count_[node] < n_) return node;
    col_key_[node] = kInf;
    relax_rows(node, col_dist_[node]);
    return -1;
  }

  void relax_rows(int j, double dist) {
    const double* arc = unkeep_ + j * side();
    const double price = price_[j];
    for (int i = 0; i < side(); i += kLanes) {
      const Doubles length = load_lanes(arc + i) + price - load_lanes(row_dual + i);
      relax(length, dist, j, row_dist_ + i, row_key_ + i, row_parent_ + i);
    }
  }

  void relax_cols(int i, double dist) {
    const double* arc = add_ + i * side();
    const double dual = row_dual[i];
    for (int j = 0; j < side(); j += kLanes) {
      const Doubles length = dual - load_lanes(price_ + j) - load_lanes(arc + j);
      relax(length, dist, i, col_dist_ + j, col_key_ + j, col_parent_ + j);
    }
  }

  void flip(int target) {
    ++col_count_[target];
    int col = target;
    for (int row = static_cast<int>(col_parent_[col]); row >= 0; row = static_cast<int>(col_parent_[col])) {
      const int from = static_cast<int>(row_parent_[row]);
      toggle(row, col);
      toggle(row, from);
      col = from;
    }
    --col_count_[col];
  }

  void toggle(int i, int j) {
    keep[i * side() + j] ^= 1;
    set_arc(i, j);
  }
};

}  // namespace sparseprop::masks
