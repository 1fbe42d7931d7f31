// Max pooling of contiguous planes: the kernel of one row, over all rows and threads.
#pragma once
#include <array>
#include <cstdint>

namespace sparseprop {

using Pair = std::array<int64_t, 2>;  // height, width

// Padding at most half the kernel, so that every window holds an element.
struct Pool {
  int64_t planes;
  Pair in, out, kernel, stride, padding;
};

// `index`: where in its plane each maximum lies; may be null.
template <class S>
void max_pool(const Pool& pool, const S* x, S* out, int64_t* index);

}  // namespace sparseprop
