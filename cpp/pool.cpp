#include "pool.h"

#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "team.h"

namespace sparseprop {

namespace {

// visit(pool of this thread, plane)
template <class S, class Visit>
void for_planes(const Windows& w, Visit visit) {
  run_list(w.planes, w.planes * w.in_size() > (1 << 15), [&] {
    return [&, pool = PlanePool<S>(w)](int64_t plane) mutable { visit(pool, plane); };
  });
}

}  // namespace

// A row of the padded plane has room for the last vector of outputs.
template <class S>
PlanePool<S>::PlanePool(const Windows& w)
    : windows_(w),
      pitch_(w.in[1] + 2 * w.padding[1] + lanes<S>() * w.stride[1]),
      padded_((w.in[0] + 2 * w.padding[0]) * pitch_, -std::numeric_limits<S>::infinity()),
      first_(w.out[1] + lanes<S>()) {
  for (int64_t i = 0; i < w.out[1]; ++i) first_[i] = static_cast<S>(std::max<int64_t>(0, w.padding[1] - i * w.stride[1]));
  for (int64_t row = 0; row < w.kernel[0]; ++row)
    for (int64_t column = 0; column < w.kernel[1]; ++column) steps_.push_back(row * w.in[1] + column);
}

template <class S>
void PlanePool<S>::forward(const S* plane, S* out, uint8_t* taps) {
  const Windows& w = windows_;
  const auto& kernels = kernels_of<S>(active_kernels());
  S* const inside = padded_.data() + w.padding[0] * pitch_ + w.padding[1];
  kernels.move.copy(inside, {pitch_, 1}, plane, {w.in[1], 1}, w.in[0], w.in[1]);
  for (int64_t h = 0; h < w.out[0]; ++h) {
    const int64_t row = h * w.stride[0], outside = std::max<int64_t>(0, w.padding[0] - row), to = h * w.out[1];
    kernels.max_pool_row({padded_.data() + row * pitch_, pitch_, w.kernel[0], w.kernel[1], w.stride[1], w.out[1],
                          first_.data(), static_cast<S>(outside * w.kernel[1]), out + to, taps ? taps + to : nullptr});
  }
}

template <class S>
void PlanePool<S>::backward(const S* grad, const uint8_t* taps, S* grad_plane) const {
  const Windows& w = windows_;
  std::fill_n(grad_plane, w.in_size(), S(0));
  for (int64_t h = 0; h < w.out[0]; ++h) {
    int64_t window = (h * w.stride[0] - w.padding[0]) * w.in[1] - w.padding[1];
    for (int64_t i = 0; i < w.out[1]; ++i, window += w.stride[1]) grad_plane[window + steps_[*taps++]] += *grad++;
  }
}

template <class S>
void max_pool(const Windows& w, const S* x, S* out, uint8_t* taps) {
  const int64_t from = w.in_size(), to = w.out_size();
  for_planes<S>(w, [=](PlanePool<S>& pool, int64_t plane) {
    pool.forward(x + plane * from, out + plane * to, taps ? taps + plane * to : nullptr);
  });
}

template <class S>
void max_pool_backward(const Windows& w, const S* grad, const uint8_t* taps, S* grad_x) {
  const int64_t to = w.in_size(), from = w.out_size();
  for_planes<S>(w, [=](PlanePool<S>& pool, int64_t plane) {
    pool.backward(grad + plane * from, taps + plane * from, grad_x + plane * to);
  });
}

template class PlanePool<float>;
template class PlanePool<double>;
template void max_pool(const Windows&, const float*, float*, uint8_t*);
template void max_pool(const Windows&, const double*, double*, uint8_t*);
template void max_pool_backward(const Windows&, const float*, const uint8_t*, float*);
template void max_pool_backward(const Windows&, const double*, const uint8_t*, double*);

}  // namespace sparseprop
