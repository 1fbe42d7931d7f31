#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "masks/exact.h"
#include "masks/greedy.h"
#include "masks/planes.h"
#include "masks/producers.h"

namespace sparseprop::masks {
namespace {

// One tile of the grid; positions run fastest, because they share cache lines in the usual layout.
struct Tile {
  std::int64_t index, group, row, col, position;
  int rows, cols;
};

struct Grid {
  PlaneShape shape;
  int m;
  std::int64_t tile_rows() const { return (shape.rows + m - 1) / m; }
  std::int64_t tile_cols() const { return (shape.cols + m - 1) / m; }
  std::int64_t size() const { return shape.groups * tile_rows() * tile_cols() * shape.positions; }
  Tile tile(std::int64_t index) const {
    const std::int64_t position = index % shape.positions;
    const std::int64_t col = index / shape.positions % tile_cols() * m;
    const std::int64_t row = index / shape.positions / tile_cols() % tile_rows() * m;
    const std::int64_t group = index / shape.positions / tile_cols() / tile_rows();
    return {index, group, row, col, position, static_cast<int>(std::min<std::int64_t>(m, shape.rows - row)),
            static_cast<int>(std::min<std::int64_t>(m, shape.cols - col))};
  }
};

std::int64_t offset(const PlaneStrides& s, const Tile& t) {
  return t.group * s.group + t.row * s.row + t.col * s.col + t.position * s.position;
}

// Loads a tile into rows of the given stride; returns the power of two it was divided by, which keeps sums of
// potentials finite and out of the denormals.
template <typename Score>
double load(const Problem<Score>& p, const Tile& t, double* out, int row_stride) {
  const Score* src = p.scores + offset(p.score_strides, t);
  double largest = 0.0;
  for (int i = 0; i < t.rows; ++i) {
    for (int j = 0; j < t.cols; ++j) {
      const double x = static_cast<double>(src[i * p.score_strides.row + j * p.score_strides.col]);
      out[i * row_stride + j] = x;
      largest = x > largest ? x : largest;
    }
  }
  if (largest == 0.0 || (largest < 1e150 && largest > 1e-150)) return 1.0;
  const double scale = std::ldexp(1.0, std::ilogb(largest) / 2) ;
  const double unit = scale * scale;
  for (int i = 0; i < t.rows; ++i)
    for (int j = 0; j < t.cols; ++j) out[i * row_stride + j] = out[i * row_stride + j] / scale / scale;
  return unit;
}

template <typename Score>
void store(const Problem<Score>& p, const Tile& t, const std::uint8_t* keep, int row_stride) {
  std::uint8_t* dst = p.mask + offset(p.mask_strides, t);
  for (int i = 0; i < t.rows; ++i)
    for (int j = 0; j < t.cols; ++j)
      dst[i * p.mask_strides.row + j * p.mask_strides.col] = keep ? keep[i * row_stride + j] : 1;
}

// Adds entries that still fit; after an optimum they can only be worth nothing.
void complete(std::uint8_t* keep, int row_stride, const Tile& t, int n) {
  int col_count[kMaxTile] = {};
  for (int i = 0; i < t.rows; ++i)
    for (int j = 0; j < t.cols; ++j) col_count[j] += keep[i * row_stride + j];
  for (int i = 0; i < t.rows; ++i) {
    std::uint8_t* row = keep + i * row_stride;
    int row_count = 0;
    for (int j = 0; j < t.cols; ++j) row_count += row[j];
    for (int j = 0; j < t.cols && row_count < n; ++j) {
      if (row[j] || col_count[j] >= n) continue;
      row[j] = 1, ++row_count, ++col_count[j];
    }
  }
}

template <int Cap, bool Fixed>
struct ExactTile {
  ExactSolver<Cap, Fixed> whole;
  // "At most n" on m x m is "exactly n" on 2m x 2m with zeros around: the padding can always take up, in a
  // nearly regular way, what the tile leaves free.
  ExactSolver<2 * Cap, Fixed> doubled;

  template <typename Score>
  void run(const Problem<Score>& p, const TileOptions& o, const Tile& t) {
    if (o.at_most || t.rows < p.m || t.cols < p.m) {
      doubled.set_side(2 * p.m);
      std::fill_n(doubled.scores, 4 * p.m * p.m, 0.0);
      load(p, t, doubled.scores, 2 * p.m);
      doubled.solve(p.n);
      complete(doubled.keep, 2 * p.m, t, p.n);
      store(p, t, doubled.keep, 2 * p.m);
      return;
    }
    whole.set_side(p.m);
    const double unit = load(p, t, whole.scores, p.m);
    whole.solve(p.n);
    store(p, t, whole.keep, p.m);
    if (o.row_dual == nullptr) return;
    for (int i = 0; i < p.m; ++i) {
      o.row_dual[t.index * p.m + i] = whole.row_dual[i] * unit;
      o.col_dual[t.index * p.m + i] = whole.col_dual[i] * unit;
    }
  }
};

template <int Cap>
struct GreedyTile {
  GreedySolver<Cap> solver;

  template <typename Score>
  void run(const Problem<Score>& p, const TileOptions& o, const Tile& t) {
    load(p, t, solver.scores, t.cols);
    solver.solve(t.rows, t.cols, p.n);
    if (o.method == Method::kGreedyFill && t.rows == p.m && t.cols == p.m) solver.fill();
    store(p, t, solver.keep, t.cols);
  }
};

template <typename Worker, typename Score>
void run_tiles(const Problem<Score>& p, const TileOptions& o) {
  const Grid grid{p.shape, p.m};
  const std::int64_t tiles = grid.size();
  const bool parallel = tiles * p.m * p.m > kSerialElements;
  // allocated here, since an allocation may throw
  const std::unique_ptr<Worker[]> workers(new Worker[parallel ? static_cast<std::size_t>(omp_get_max_threads()) : 1]);
  // tiles differ in the number of augmentations, hence dynamic; the result does not depend on who solves one
#pragma omp parallel for schedule(dynamic, 64) if (parallel)
  for (std::int64_t index = 0; index < tiles; ++index) {
    const Tile t = grid.tile(index);
    if (p.dense_tail && (t.rows < p.m || t.cols < p.m)) {
      store(p, t, nullptr, 0);
    } else {
      workers[static_cast<std::size_t>(omp_get_thread_num())].run(p, o, t);
    }
  }
}

}  // namespace

template <typename Score>
void transposable_nm_mask(const Problem<Score>& problem, const TileOptions& options) {
  if (options.method != Method::kExact) {
    return problem.m <= 16 ? run_tiles<GreedyTile<16>>(problem, options)
                           : run_tiles<GreedyTile<kMaxTile>>(problem, options);
  }
  switch (problem.m) {
    case 4: return run_tiles<ExactTile<4, true>>(problem, options);
    case 8: return run_tiles<ExactTile<8, true>>(problem, options);
    case 16: return run_tiles<ExactTile<16, true>>(problem, options);
    case 32: return run_tiles<ExactTile<32, true>>(problem, options);
    default: return run_tiles<ExactTile<kMaxTile, false>>(problem, options);
  }
}

template void transposable_nm_mask<float>(const Problem<float>&, const TileOptions&);
template void transposable_nm_mask<double>(const Problem<double>&, const TileOptions&);

}  // namespace sparseprop::masks
