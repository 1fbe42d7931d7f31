#include "depthwise.h"

#include <algorithm>

#include "dispatch.h"
#include "usual.h"

namespace sparseprop {

// The last vector of a row may read into the rows behind, a vector's lanes `step` elements apart: what comes of it is not
// stored.
template <class S>
DepthwisePlane<S>::Padded::Padded(int64_t rows, int64_t columns, int64_t top, int64_t left, int64_t step) {
  constexpr int64_t line = lanes<S>();
  pitch = (columns + line - 1) / line * line;
  storage.assign((rows + 1) * pitch + (8 + step) * line, S(0));
  const auto address = reinterpret_cast<uintptr_t>(storage.data());
  begin = storage.data() + (64 - address % 64) % 64 / sizeof(S);
  first = begin + top * pitch + left;
}

template <class S>
DepthwisePlane<S>::DepthwisePlane(const Windows& w, bool backward)
    : windows_(w),
      spreads_(w.stride[0] > 1 || w.stride[1] > 1),
      padded_(w.in[0] + 2 * w.padding[0], w.in[1] + 2 * w.padding[1], w.padding[0], w.padding[1], w.stride[1]),
      spread_(backward ? std::max(w.in[0] + w.padding[0], (w.out[0] - 1) * w.stride[0] + 1) + w.kernel[0] - 1 : 0,
              std::max(w.in[1] + w.padding[1], (w.out[1] - 1) * w.stride[1] + 1) + w.kernel[1] - 1, w.kernel[0] - 1, w.kernel[1] - 1, 1),
      grad_(backward && spreads_ ? w.out_size() : 0),
      flipped_(w.taps()) {}

template <class S>
void DepthwisePlane<S>::forward(const S* weights, S* out, const ChannelFinish<S>* finish, const NormSums<S>* sums) const {
  const Windows& w = windows_;
  kernels_of<S>(active_kernels()).depthwise({padded_.begin, padded_.pitch, w.kernel[0], w.kernel[1], w.stride[0], w.stride[1],
                                             weights, out, w.out[1], w.out[0], w.out[1], finish, sums});
}

template <class S>
S DepthwisePlane<S>::usual_output(const S* weights) const {
  const Windows& w = windows_;
  return usual<S>(w.out_size(), [&](int64_t i) {
    const S *at = padded_.begin + i / w.out[1] * w.stride[0] * padded_.pitch + i % w.out[1] * w.stride[1], *weight = weights;
    S sum = 0;
    for (int64_t r = 0; r < w.kernel[0]; ++r, at += padded_.pitch)
      for (int64_t c = 0; c < w.kernel[1]; ++c) sum += *weight++ * at[c];
    return sum;
  });
}

template <class S>
void DepthwisePlane<S>::backward(const S* weights, const S* x, int64_t ahead, S* grad_x, const NormSums<S>& norm, S* weight_sums) {
  const Windows& w = windows_;
  const auto& kernels = kernels_of<S>(active_kernels());
  if (spreads_) {
    kernels.move.copy(spread_.first, {w.stride[0] * spread_.pitch, w.stride[1]}, grad_.data(), {w.out[1], 1}, w.out[0], w.out[1]);
  }
  std::reverse_copy(weights, weights + w.taps(), flipped_.begin());
  kernels.depthwise_grad({spread_.begin + w.padding[0] * spread_.pitch + w.padding[1], spread_.pitch, w.kernel[0], w.kernel[1],
                          w.stride[0], (w.kernel[0] - 1 - w.padding[0]) % w.stride[0], flipped_.data(), x, grad_x, w.in[0],
                          w.in[1], ahead, norm, weight_sums});
}

template class DepthwisePlane<float>;
template class DepthwisePlane<double>;

}  // namespace sparseprop
