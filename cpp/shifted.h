// Copies of a panel's rows, shifted so that what the taps of a kernel read begins at whole vectors: a vector that crosses a line
// of the cache takes two reads, and of the shifts of a 3x3 kernel nearly all do.
#pragma once
#include <cstdint>
#include <vector>

#include "lowering.h"

namespace sparseprop {

// Of one tile and one channel, whose panel rows are its phases. Taps whose shifts differ by few whole vectors share a copy.
struct Shifted {
  struct Copy {
    int64_t phase, from;  // panel row of the channel, and the column behind the tile's first that the copy begins with
    int64_t to, beyond;   // place among the channel's copies, and columns beyond the tile
  };
  std::vector<Copy> copies;
  std::vector<Tap> taps;  // where each tap finds its columns, as a shift in phase 0
  int64_t pitch = 0;      // elements of a channel's copies; 0: not used

  Shifted() = default;
  Shifted(const std::vector<Tap>& taps, int64_t tile, int64_t vector);
  // A copy for each tap.
  static Shifted apart(const std::vector<Tap>& taps, int64_t tile, int64_t vector);
};

}  // namespace sparseprop
