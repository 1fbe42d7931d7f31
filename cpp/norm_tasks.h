// How batch norm is cut into tasks, and its planes on their way through a max pooling.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "norm.h"
#include "pool.h"
#include "team.h"

namespace sparseprop {

// Elements of adjacent planes that one task reads in a row: memory is read page by page however small the planes are
// (2048 planes of 7x7, batch 32, forward and backward: 31 -> 9.5 ms), and what is read twice stays in the cache.
constexpr int64_t kRun = 1024;

template <class S>
const KernelsOf<S>& table() { return kernels_of<S>(active_kernels()); }

// What the kernels need per channel, as arrays.
template <class S>
struct Channels {
  Channels(int64_t n, bool training) : training(training), scale(n), shift(n), scale_grad(n), slope(n), offset(n) {}
  bool training;
  std::vector<S> scale, shift, scale_grad, slope, offset;

  void point(NormArgs<S>& a, int64_t c) const {
    a.scale = scale.data() + c;
    a.shift = shift.data() + c;
    a.scale_grad = scale_grad.data() + c;
    a.slope = training ? slope.data() + c : nullptr;
    a.offset = offset.data() + c;
  }
  void affine(int64_t c, const S* gamma, const S* beta, double mean, double inv_std) {
    const Affine<S> of(gamma, beta, c, mean, inv_std);
    scale[c] = of.scale;
    shift[c] = of.shift;
  }
};

template <class T>
T* moved(T* p, int64_t by) { return p ? p + by : nullptr; }

template <class S>
NormArgs<S> slice(const NormShape& shape, const NormArgs<S>& all, int64_t start, int64_t rows, int64_t channels) {
  NormArgs<S> a = all;
  a.rows = rows;
  a.pitch = a.x_pitch = a.out_pitch = shape.channels * shape.inner;
  a.channels = channels;
  a.n = shape.inner;
  a.x = moved(a.x, start);
  a.other = moved(a.other, start);
  a.grad = moved(a.grad, start);
  a.masked = moved(a.masked, start);
  a.out = moved(a.out, start);
  return a;
}

// What to normalize by where that does not follow from the batch.
template <class S>
void known_stats(const NormForward<S>& call, int64_t channels) {
  for (int64_t c = 0; c < channels && !call.training; ++c) {
    call.mean[c] = call.running.mean[c];
    call.inv_std[c] = static_cast<S>(1.0 / std::sqrt(double(call.running.variance[c]) + call.eps));
  }
}

template <class S>
void finish_stats(const NormForward<S>& call, int64_t c, double count, double sum, double squares, double close) {
  const double mean = sum / count, variance = std::max(squares / count - mean * mean, 0.0);  // in this order NaN stays NaN
  call.mean[c] = static_cast<S>(close + mean);
  call.inv_std[c] = static_cast<S>(1.0 / std::sqrt(variance + call.eps));
  if (!call.running.mean) return;
  const S share = static_cast<S>(call.running.share), kept = static_cast<S>(1.0 - call.running.share);
  auto move = [&](S& running, double found) { running = running * kept + static_cast<S>(found) * share; };
  move(call.running.mean[c], close + mean);
  move(call.running.variance[c], variance * count / std::max(1.0, count - 1.0));
}

// The gradients of channel c's parameters, and what `grad_apply` needs, from its two sums.
template <class S>
void finish_gradients(const NormBackward<S>& call, Channels<S>& per, int64_t c, double count, double sum, double product) {
  const double inv_std = call.inv_std[c], scale = (call.gamma ? double(call.gamma[c]) : 1.0) * inv_std;
  if (call.grad_gamma) call.grad_gamma[c] = static_cast<S>(product * inv_std);
  if (call.grad_beta) call.grad_beta[c] = static_cast<S>(sum);
  per.scale_grad[c] = static_cast<S>(scale);
  per.slope[c] = static_cast<S>(-scale * inv_std * inv_std * product / count);
  per.offset[c] = static_cast<S>(-scale * sum / count);
}

// Runs task(args, first channel, sums of its channels, scratch) for groups of adjacent planes.
template <class S, class Task>
void run_planes(const NormShape& shape, const NormArgs<S>& all, bool parallel, Task task) {
  const int64_t group = std::max<int64_t>(1, kRun / shape.inner), tasks = (shape.channels + group - 1) / group;
  run_each(tasks, parallel, [&](int64_t i) {
    const int64_t first = i * group, channels = std::min(group, shape.channels - first);
    std::vector<double> sums(2 * channels, 0.0);
    std::vector<S> scratch(table<S>().planes.scratch_per_channel * channels);
    task(slice(shape, all, first * shape.inner, shape.outer, channels), first, sums.data(), scratch.data());
  });
}

// The planes of some adjacent channels one by one, each on its way from or to a max pooling in a buffer of its own.
template <class S>
class PooledPlanes {
 public:
  PooledPlanes(const NormShape& shape, const Channels<S>& per, const Windows& pool)
      : shape_(shape), per_(per), pool_(pool), plane_(shape.inner), pooled_(pool.out_size()) {}

  void apply(const NormArgs<S>& a, int64_t first, S* out, uint8_t* taps) {
    visit(a, first, [&](NormArgs<S> one, int64_t plane, int64_t) {
      one.out = plane_.data();
      table<S>().planes.apply(one);
      pool_.forward(plane_.data(), out + plane * pooled_, moved(taps, plane * pooled_));
    });
  }
  // kernel(args with the gradient before the pooling, channel in the slice)
  template <class Kernel>
  void backward(const NormArgs<S>& a, int64_t first, const S* grad, const uint8_t* taps, Kernel kernel) {
    visit(a, first, [&](NormArgs<S> one, int64_t plane, int64_t c) {
      pool_.backward(grad + plane * pooled_, taps + plane * pooled_, plane_.data());
      one.grad = plane_.data();
      kernel(one, c);
    });
  }

 private:
  template <class Visit>
  void visit(const NormArgs<S>& a, int64_t first, Visit visit) {
    for (int64_t row = 0; row < a.rows; ++row) {
      for (int64_t c = 0; c < a.channels; ++c) {
        NormArgs<S> one = slice(shape_, a, row * a.pitch + c * a.n, 1, 1);
        per_.point(one, first + c);
        one.mean = a.mean + c;
        visit(one, row * shape_.channels + first + c, c);
      }
    }
  }

  const NormShape& shape_;
  const Channels<S>& per_;
  PlanePool<S> pool_;
  std::vector<S> plane_;
  const int64_t pooled_;
};

}  // namespace sparseprop
