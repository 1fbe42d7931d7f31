// What the tasks of a depthwise chain share: a group of channels with the batch norms on both sides.
#pragma once
#include <algorithm>
#include <vector>

#include "chain.h"
#include "depthwise.h"
#include "norm_tasks.h"
#include "run.h"

namespace sparseprop {

// One side of the convolution: the planes there, and what the batch norm of that side does to each channel.
template <class S>
struct ChainSide {
  NormShape shape;
  Channels<S> per;

  ChainSide(int64_t images, int64_t channels, int64_t inner, double cap, bool training)
      : shape{images, channels, inner, cap}, per(channels, training) {}

  int64_t at(int64_t image, int64_t c) const { return (image * shape.channels + c) * shape.inner; }
  // How far behind an image's plane the next image's lies, 0 behind the last.
  int64_t ahead(int64_t image) const { return image + 1 < shape.outer ? at(1, 0) : 0; }
  double count() const { return double(shape.outer * shape.inner); }
  template <class Call>
  void affine(const Call& call, int64_t c) { per.affine(c, call.gamma, call.beta, call.mean[c], call.inv_std[c]); }

  ChannelFinish<S> finish(int64_t c) const { return channel_finish(per.scale[c], per.shift[c], shape.cap); }
  // One plane of channel c, at x, as rows of `width`.
  NormArgs<S> plane(int64_t c, const S* x, int64_t width, PlaneRows<S> out) const {
    NormArgs<S> a{};
    a.rows = shape.inner / width;
    a.channels = 1;
    a.n = a.pitch = a.x_pitch = width;
    a.out_pitch = out.pitch;
    a.cap = static_cast<S>(shape.cap);
    a.x = x;
    a.out = out.data;
    per.point(a, c);
    return a;
  }
  // Adjacent channels in some images.
  NormArgs<S> planes(int64_t first, int64_t channels, int64_t images, const S* x) const {
    NormArgs<S> a{};
    a.rows = images;
    a.channels = channels;
    a.n = shape.inner;
    a.pitch = a.x_pitch = a.out_pitch = shape.channels * shape.inner;
    a.cap = static_cast<S>(shape.cap);
    a.x = x;
    per.point(a, first);
    return a;
  }
};

// Sums of some channels that kernels leave in vectors, `n` for each: added up before many terms have met in a float.
template <class S>
class Partials {
 public:
  Partials(int64_t channels, int64_t n, const Pair& plane)
      : n_(n), period_(std::max<int64_t>(1, kTerms / terms(plane))), vectors_(channels * n * lanes<S>()), sums_(channels * n, 0.0) {}

  S* vectors(int64_t c) { return vectors_.data() + c * n_ * lanes<S>(); }
  double sum(int64_t c, int64_t i) const { return sums_[c * n_ + i]; }
  // After the planes of one image.
  void add_up(bool last) {
    if (++planes_ % period_ != 0 && !last) return;
    for (size_t i = 0; i < sums_.size(); ++i) sums_[i] += total(vectors_.data() + i * lanes<S>());
    std::fill(vectors_.begin(), vectors_.end(), S(0));
  }

 private:
  static constexpr int64_t kTerms = 256;

  // That a plane adds to each lane in use.
  static int64_t terms(const Pair& plane) { return plane[0] * ceil_div(plane[1], table<S>().planes.scratch_per_channel / 2); }
  // Four sums at once: none waits for its own latency.
  static double total(const S* vector) {
    double sums[4] = {0, 0, 0, 0};
    for (int i = 0; i < lanes<S>(); ++i) sums[i % 4] += static_cast<double>(vector[i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  const int64_t n_, period_;
  int64_t planes_ = 0;
  std::vector<S> vectors_;
  std::vector<double> sums_;
};

// Some adjacent channels, on one thread.
template <class S>
class ChainTask {
 public:
  ChainTask(const ChainShape& shape, ChainSide<S>& before, ChainSide<S>& behind, DepthwisePlane<S>& convolution,
            int64_t first, int64_t channels, const S* x, bool normed)
      : windows_(shape.windows), before_(before), behind_(behind), first_(first), channels_(channels),
        taps_(shape.windows.taps()), x_(x), normed_(normed), convolution_(convolution),
        scratch_(table<S>().planes.scratch_per_channel * channels) {}

 protected:
  int64_t images() const { return before_.shape.outer; }
  // visit(channel)
  template <class Visit>
  void channels(Visit visit) const {
    for (int64_t c = first_; c < first_ + channels_; ++c) visit(c);
  }

  // The convolution's input of one plane.
  void load(int64_t image, int64_t c) {
    const S* const x = x_ + before_.at(image, c);
    const PlaneRows<S> to = convolution_.input();
    if (normed_) {
      return table<S>().pad_plane({x, windows_.in[0], windows_.in[1], before_.ahead(image), to.data, to.pitch, before_.finish(c)});
    }
    table<S>().move.copy(to.data, {to.pitch, 1}, x, {windows_.in[1], 1}, windows_.in[0], windows_.in[1]);
  }

  // What is done to channel c in front of the convolution.
  ChannelFinish<S> front(int64_t c) const { return normed_ ? before_.finish(c) : channel_finish(S(1), S(0), 0); }

  const Windows& windows_;
  ChainSide<S>&before_, &behind_;
  const int64_t first_, channels_, taps_;
  const S* const x_;
  const bool normed_;
  DepthwisePlane<S>& convolution_;
  std::vector<S> scratch_;
};

}  // namespace sparseprop
