// A number near those of a channel, for variances: sums of squares around it lose no digits.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

namespace sparseprop {

// Median of elements spread over `count`; value(i) is the i-th. The first one would do, but for outliers: one of a hundred
// standard deviations there cost float32 four digits.
template <class S, class Value>
S usual(int64_t count, Value value) {
  std::array<S, 5> some;
  constexpr int64_t last = some.size() - 1;
  for (int64_t i = 0; i <= last; ++i) {
    int64_t at = i;  // in order; NaN, which has none, stops where it is
    const S next = value(i * (count - 1) / last);
    for (; at > 0 && next < some[at - 1]; --at) some[at] = some[at - 1];
    some[at] = next;
  }
  return some[last / 2];
}

}  // namespace sparseprop
