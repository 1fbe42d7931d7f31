// Scores and masks as seen by the mask producers: strided (group, row, column, position) views of a weight.
#pragma once

#include <cstdint>

namespace sparseprop::masks {

// A weight (Co, Ci/g, *kernel) is g groups of Co/g rows and Ci/g columns at every kernel position.
struct PlaneShape {
  std::int64_t groups;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t positions;
};

// Element strides, in the order of PlaneShape; any strides, overlapping ones in scores included.
struct PlaneStrides {
  std::int64_t group;
  std::int64_t row;
  std::int64_t col;
  std::int64_t position;
};

// Scores must be finite and non-negative (-0.0 counts as 0); the caller has checked this.
template <typename Score>
struct Problem {
  PlaneShape shape;
  const Score* scores;
  PlaneStrides score_strides;
  std::uint8_t* mask;  // 0 or 1 per element, every element is written, never overlaps scores
  PlaneStrides mask_strides;
  int n;  // kept
  int m;  // group length and tile side
  bool dense_tail;  // incomplete groups or tiles are kept whole; otherwise at most n per row (and column)
};

// Largest tile side: an "at most" tile is solved as a zero-padded tile of twice this side.
inline constexpr int kMaxTile = 64;

// Below this many elements a parallel region costs more than it saves.
inline constexpr std::int64_t kSerialElements = 16384;

}  // namespace sparseprop::masks
