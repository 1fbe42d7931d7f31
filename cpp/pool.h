// Max pooling of contiguous planes, and its gradient.
#pragma once
#include <cstdint>
#include <vector>

#include "windows.h"

namespace sparseprop {

// One thread's work on planes. A maximum's place is its number in the window, row by row: a byte.
template <class S>
class PlanePool {
 public:
  explicit PlanePool(const Windows& windows);
  void forward(const S* plane, S* out, uint8_t* taps);  // taps may be null
  void backward(const S* grad, const uint8_t* taps, S* grad_plane) const;

 private:
  const Windows windows_;
  const int64_t pitch_;
  std::vector<S> padded_, first_;
  std::vector<int64_t> steps_;  // from a window's first element to each of its elements
};

template <class S>
void max_pool(const Windows& windows, const S* x, S* out, uint8_t* taps);
template <class S>
void max_pool_backward(const Windows& windows, const S* grad, const uint8_t* taps, S* grad_x);

}  // namespace sparseprop
