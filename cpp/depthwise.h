// Depthwise convolution of one plane at a time, with its gradients.
#pragma once
#include <vector>

#include "kernels.h"
#include "windows.h"

namespace sparseprop {

// Rows of a plane, `pitch` elements apart.
template <class S>
struct PlaneRows {
  S* data;
  int64_t pitch;
};

// One thread's work, for as many planes as it likes: making one clears its padding. The caller writes a plane to `input()`,
// a gradient to `grad()`; both stay as they are until the next. Without `backward` there is no room for gradients.
template <class S>
class DepthwisePlane {
 public:
  DepthwisePlane(const Windows& windows, bool backward);

  PlaneRows<S> input() { return {padded_.first, padded_.pitch}; }
  PlaneRows<S> grad() { return spreads_ ? PlaneRows<S>{grad_.data(), windows_.out[1]} : PlaneRows<S>{spread_.first, spread_.pitch}; }

  // `finish` of the outputs, or null; or the sums of a batch norm behind, or null.
  void forward(const S* weights, S* out, const ChannelFinish<S>* finish, const NormSums<S>* sums) const;
  S usual_output(const S* weights) const;
  // From `grad()`, for a plane x that `norm` was done to on its way to `input()`; see `DepthwiseGradArgs`.
  void backward(const S* weights, const S* x, int64_t ahead, S* grad_x, const NormSums<S>& norm, S* weight_sums);

 private:
  // A plane in zeros; rows begin at cache lines, `first` is where the plane's data begin.
  struct Padded {
    Padded(int64_t rows, int64_t columns, int64_t top, int64_t left, int64_t step);
    Padded(Padded&&) = default;  // not copied: the pointers are into the storage
    std::vector<S> storage;
    int64_t pitch;
    S *begin, *first;
  };

  const Windows windows_;
  const bool spreads_;  // windows are more than one element apart
  Padded padded_;
  Padded spread_;  // the gradient at the distance of the windows: every input has a window of it around
  std::vector<S> grad_, flipped_;
};

}  // namespace sparseprop
