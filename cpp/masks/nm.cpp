#include <algorithm>

#include "masks/planes.h"
#include "masks/producers.h"

namespace sparseprop::masks {
namespace {

template <int Fixed, typename Score>
void select_group(const Score* a, std::uint8_t* keep, int size, int n) {
  const int m = Fixed > 0 ? Fixed : size;
  for (int j = 0; j < m; ++j) {
    int rank = 0;
    for (int l = 0; l < j; ++l) rank += a[l] >= a[j];
    for (int l = j + 1; l < m; ++l) rank += a[l] > a[j];
    keep[j] = rank < n;
  }
}

template <int Fixed, typename Score>
void mask_row(const Problem<Score>& p, std::int64_t group, std::int64_t row) {
  const PlaneStrides& in = p.score_strides;
  const PlaneStrides& out = p.mask_strides;
  Score a[kMaxTile];
  std::uint8_t keep[kMaxTile];
  for (std::int64_t col = 0; col < p.shape.cols; col += p.m) {
    const int size = static_cast<int>(std::min<std::int64_t>(p.m, p.shape.cols - col));
    const Score* src = p.scores + group * in.group + row * in.row + col * in.col;
    std::uint8_t* dst = p.mask + group * out.group + row * out.row + col * out.col;
    // positions innermost: they share cache lines in the usual layout
    for (std::int64_t pos = 0; pos < p.shape.positions; ++pos) {
      for (int j = 0; j < size; ++j) a[j] = src[pos * in.position + j * in.col];
      if (size == p.m) {
        select_group<Fixed>(a, keep, size, p.n);
      } else {
        select_group<0>(a, keep, size, p.dense_tail ? size : p.n);
      }
      for (int j = 0; j < size; ++j) dst[pos * out.position + j * out.col] = keep[j];
    }
  }
}

template <int Fixed, typename Score>
void mask_rows(const Problem<Score>& p) {
  const std::int64_t rows = p.shape.groups * p.shape.rows;
  [[maybe_unused]] const bool parallel = rows * p.shape.cols * p.shape.positions > kSerialElements;
#pragma omp parallel for schedule(static) if (parallel)
  for (std::int64_t r = 0; r < rows; ++r) mask_row<Fixed>(p, r / p.shape.rows, r % p.shape.rows);
}

}  // namespace

template <typename Score>
void nm_mask(const Problem<Score>& problem) {
  switch (problem.m) {
    case 4: return mask_rows<4>(problem);
    case 8: return mask_rows<8>(problem);
    case 16: return mask_rows<16>(problem);
    case 32: return mask_rows<32>(problem);
    default: return mask_rows<0>(problem);
  }
}

template void nm_mask<float>(const Problem<float>&);
template void nm_mask<double>(const Problem<double>&);

}  // namespace sparseprop::masks
