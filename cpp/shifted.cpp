#include "shifted.h"

#include <algorithm>

namespace sparseprop {

Shifted::Shifted(const std::vector<Tap>& all, int64_t tile, int64_t vector) {
  // Whether a copy has what a tap reads, or would if it were as much as `more` longer on either side.
  const auto near = [=](const Copy& copy, const Tap& tap, int64_t more) {
    return copy.phase == tap.phase && (copy.from - tap.shift) % vector == 0 && tap.shift >= copy.from - more &&
           tap.shift <= copy.from + copy.beyond + more;
  };
  for (const Tap& tap : all) {
    const auto found = std::find_if(copies.begin(), copies.end(), [&](const Copy& copy) { return near(copy, tap, tile); });
    if (found == copies.end()) {
      copies.push_back({tap.phase, tap.shift, 0, 0});
    } else {
      const int64_t first = std::min(found->from, tap.shift), last = std::max(found->from + found->beyond, tap.shift);
      found->from = first;
      found->beyond = last - first;
    }
  }
  for (Copy& copy : copies) {
    copy.to = pitch;
    pitch += tile + copy.beyond;
  }
  if (pitch / vector % 2 == 0) pitch += vector;  // odd lines: rows spread over the cache's sets
  for (const Tap& tap : all) {
    const auto copy = std::find_if(copies.begin(), copies.end(), [&](const Copy& c) { return near(c, tap, 0); });
    taps.push_back({0, copy->to + tap.shift - copy->from});
  }
}

Shifted Shifted::apart(const std::vector<Tap>& all, int64_t tile, int64_t vector) {
  Shifted s;
  for (const Tap& tap : all) {
    s.copies.push_back({tap.phase, tap.shift, s.pitch, 0});
    s.taps.push_back({0, s.pitch});
    s.pitch += tile;
  }
  s.pitch += vector;  // the last run may be stored as a whole vector
  if (s.pitch / vector % 2 == 0) s.pitch += vector;
  return s;
}

}  // namespace sparseprop
