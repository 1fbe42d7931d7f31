#include "pool.h"

#include <omp.h>

#include <algorithm>
#include <limits>

#include "dispatch.h"

namespace sparseprop {

namespace {

// visit(pool of this thread, plane)
template <class S, class Visit>
void for_planes(const Pool& p, Visit visit) {
  const bool parallel = p.planes * p.in[0] * p.in[1] > (1 << 15) && omp_get_max_threads() > 1 && !omp_in_parallel();
#pragma omp parallel if (parallel)
  {
    PlanePool<S> pool(p);
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < p.planes; ++plane) visit(pool, plane);
  }
}

}  // namespace

// A row of the padded plane has room for the last vector of outputs.
template <class S>
PlanePool<S>::PlanePool(const Pool& p)
    : pool_(p),
      pitch_(p.in[1] + 2 * p.padding[1] + lanes<S>() * p.stride[1]),
      padded_((p.in[0] + 2 * p.padding[0]) * pitch_, -std::numeric_limits<S>::infinity()),
      first_(p.out[1] + lanes<S>()) {
  for (int64_t i = 0; i < p.out[1]; ++i) first_[i] = static_cast<S>(std::max<int64_t>(0, p.padding[1] - i * p.stride[1]));
  for (int64_t row = 0; row < p.kernel[0]; ++row)
    for (int64_t column = 0; column < p.kernel[1]; ++column) steps_.push_back(row * p.in[1] + column);
}

template <class S>
void PlanePool<S>::forward(const S* plane, S* out, uint8_t* taps) {
  const Pool& p = pool_;
  const auto& kernels = kernels_of<S>(active_kernels());
  S* const inside = padded_.data() + p.padding[0] * pitch_ + p.padding[1];
  kernels.move.copy(inside, {pitch_, 1}, plane, {p.in[1], 1}, p.in[0], p.in[1]);
  for (int64_t h = 0; h < p.out[0]; ++h) {
    const int64_t row = h * p.stride[0], outside = std::max<int64_t>(0, p.padding[0] - row), to = h * p.out[1];
    kernels.max_pool_row({padded_.data() + row * pitch_, pitch_, p.kernel[0], p.kernel[1], p.stride[1], p.out[1],
                          first_.data(), static_cast<S>(outside * p.kernel[1]), out + to, taps ? taps + to : nullptr});
  }
}

template <class S>
void PlanePool<S>::backward(const S* grad, const uint8_t* taps, S* grad_plane) const {
  const Pool& p = pool_;
  std::fill_n(grad_plane, p.in[0] * p.in[1], S(0));
  for (int64_t h = 0; h < p.out[0]; ++h) {
    int64_t window = (h * p.stride[0] - p.padding[0]) * p.in[1] - p.padding[1];
    for (int64_t i = 0; i < p.out[1]; ++i, window += p.stride[1]) grad_plane[window + steps_[*taps++]] += *grad++;
  }
}

template <class S>
void max_pool(const Pool& p, const S* x, S* out, uint8_t* taps) {
  const int64_t from = p.in[0] * p.in[1], to = p.out[0] * p.out[1];
  for_planes<S>(p, [=](PlanePool<S>& pool, int64_t plane) {
    pool.forward(x + plane * from, out + plane * to, taps ? taps + plane * to : nullptr);
  });
}

template <class S>
void max_pool_backward(const Pool& p, const S* grad, const uint8_t* taps, S* grad_x) {
  const int64_t to = p.in[0] * p.in[1], from = p.out[0] * p.out[1];
  for_planes<S>(p, [=](PlanePool<S>& pool, int64_t plane) {
    pool.backward(grad + plane * from, taps + plane * from, grad_x + plane * to);
  });
}

template class PlanePool<float>;
template class PlanePool<double>;
template void max_pool(const Pool&, const float*, float*, uint8_t*);
template void max_pool(const Pool&, const double*, double*, uint8_t*);
template void max_pool_backward(const Pool&, const float*, const uint8_t*, float*);
template void max_pool_backward(const Pool&, const double*, const uint8_t*, double*);

}  // namespace sparseprop
