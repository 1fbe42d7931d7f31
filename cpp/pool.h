// Max pooling of contiguous planes, and its gradient.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace sparseprop {

using Pair = std::array<int64_t, 2>;  // height, width

// Padding at most half the kernel, so that every window holds an element; kernels of at most 255 elements.
struct Pool {
  int64_t planes;
  Pair in, out, kernel, stride, padding;
};

// One thread's work on planes. A maximum's place is its number in the window, row by row: a byte.
template <class S>
class PlanePool {
 public:
  explicit PlanePool(const Pool& pool);
  void forward(const S* plane, S* out, uint8_t* taps);  // taps may be null
  void backward(const S* grad, const uint8_t* taps, S* grad_plane) const;

 private:
  const Pool pool_;
  const int64_t pitch_;
  std::vector<S> padded_, first_;
  std::vector<int64_t> steps_;  // from a window's first element to each of its elements
};

template <class S>
void max_pool(const Pool& pool, const S* x, S* out, uint8_t* taps);
template <class S>
void max_pool_backward(const Pool& pool, const S* grad, const uint8_t* taps, S* grad_x);

}  // namespace sparseprop
