// Batch 16, two threads of a Xeon, in training, before `pad_plane`, forward / backward, beside the steps one by one in contiguous and in channels_last layout (ms):
//   144 planes of 56x56  6.0 / 16  (17 / 29, 14 / 25)      384 of 14x14  1.7 / 4.8  (3.4 / 5.4, 2.7 / 4.1)
//   96 of 112x112, stride 2  12 / 31  (27 / 50, 21 / 41)   960 of 7x7    2.0 / 5.9  (2.5 / 3.9, 1.9 / 3.0)
// Small planes gain nothing by themselves; networks gain, as what surrounds them stays contiguous.
// Tried: whole planes normalized, then copied into their padding (5 % slower); sums in a pass of their own over the
// planes of all images (no difference); small planes one by one in training (no difference in MobileNetV2's step); two rows
// of outputs at once, which saves a third of the loads (0 to 15 % slower), two padded planes in turn, so that no load waits
// for a store just done (no difference).
#include "chain.h"

#include <limits>

#include "depthwise.h"
#include "norm_tasks.h"
#include "run.h"

namespace sparseprop {
namespace {

// One side of the convolution: the planes there, and what the batch norm of that side does to each channel.
template <class S>
struct Side {
  NormShape shape;
  Channels<S> per;

  Side(int64_t images, int64_t channels, int64_t inner, double cap, bool training)
      : shape{images, channels, inner, cap}, per(channels, training) {}

  int64_t at(int64_t image, int64_t c) const { return (image * shape.channels + c) * shape.inner; }
  double count() const { return double(shape.outer * shape.inner); }
  template <class Call>
  void affine(const Call& call, int64_t c) { per.affine(c, call.gamma, call.beta, call.mean[c], call.inv_std[c]); }

  ChannelFinish<S> finish(int64_t c) const {
    constexpr S most = std::numeric_limits<S>::infinity();
    const S cap = static_cast<S>(shape.cap);
    return {per.scale[c], per.shift[c], cap > S(0) ? S(0) : -most, cap > S(0) ? cap : most};
  }
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

// Some adjacent channels, on one thread.
template <class S>
class Task {
 public:
  Task(const ChainShape& shape, Side<S>& before, Side<S>& behind, DepthwisePlane<S>& convolution, int64_t first,
       int64_t channels, const S* x, bool normed)
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
      const int64_t ahead = image + 1 < images() ? before_.at(1, 0) : 0;
      return table<S>().pad_plane({x, windows_.in[0], windows_.in[1], ahead, to.data, to.pitch, before_.finish(c)});
    }
    table<S>().move.copy(to.data, {to.pitch, 1}, x, {windows_.in[1], 1}, windows_.in[0], windows_.in[1]);
  }

  const Windows& windows_;
  Side<S>&before_, &behind_;
  const int64_t first_, channels_, taps_;
  const S* const x_;
  const bool normed_;
  DepthwisePlane<S>& convolution_;
  std::vector<S> scratch_;
};

template <class S>
class ForwardTask : Task<S> {
 public:
  using Task<S>::Task;

  void run(const ChainForward<S>& call) {
    if (call.first) statistics(this->before_, *call.first, this->x_);
    const bool known = !call.second->training;  // then each plane is finished on its way into memory
    if (known) statistics(this->behind_, *call.second, call.out);
    for (int64_t image = 0; image < this->images(); ++image) {
      this->channels([&](int64_t c) {
        const ChannelFinish<S> finish = this->behind_.finish(c);
        this->load(image, c);
        this->convolution_.forward(call.weights + c * this->taps_, call.out + this->behind_.at(image, c), known ? &finish : nullptr);
      });
    }
    if (known) return;
    statistics(this->behind_, *call.second, call.out);
    S* const out = call.out + this->behind_.at(0, this->first_);
    NormArgs<S> a = this->behind_.planes(this->first_, this->channels_, this->images(), out);
    a.out = out;
    table<S>().planes.apply(a);
  }

 private:
  // The statistics of x if they are wanted, then what the batch norm does to each channel.
  void statistics(Side<S>& side, const NormForward<S>& call, const S* x) {
    const int64_t first = this->first_, channels = this->channels_;
    if (call.training) {
      std::vector<S> close(channels);
      for (int64_t c = 0; c < channels; ++c) close[c] = x[side.at(0, first + c)];
      std::vector<double> sums(2 * channels, 0.0);
      NormArgs<S> a = side.planes(first, channels, this->images(), x + side.at(0, first));
      a.mean = close.data();
      table<S>().planes.sums(a, sums.data(), sums.data() + channels, this->scratch_.data());
      for (int64_t c = 0; c < channels; ++c) finish_stats(call, first + c, side.count(), sums[c], sums[channels + c], close[c]);
    }
    for (int64_t c = first; c < first + channels; ++c) side.affine(call, c);
  }
};

template <class S>
class BackwardTask : Task<S> {
 public:
  using Task<S>::Task;

  // `convolved` has room for the convolution's outputs of these channels, in all images.
  void run(const ChainBackward<S>& call, S* convolved) {
    const int64_t image_size = this->channels_ * this->behind_.shape.inner;
    std::vector<double> sums(2 * this->channels_, 0.0), weights(this->channels_ * this->taps_, 0.0);
    for (int64_t image = 0; image < this->images(); ++image) convolve(call, image, convolved + image * image_size, sums);
    finish(this->behind_, *call.second, sums);
    std::fill(sums.begin(), sums.end(), 0.0);
    // backwards: the last images are still in the cache
    for (int64_t image = this->images(); image-- > 0;) gradients(call, image, convolved + image * image_size, weights, sums);
    for (size_t t = 0; call.grad_weights && t < weights.size(); ++t)
      call.grad_weights[this->first_ * this->taps_ + t] = static_cast<S>(weights[t]);
    if (!call.first || !call.grad_x) return;
    finish(this->before_, *call.first, sums);
    table<S>().planes.grad_apply(first_norm(call, 0, this->images()));
  }

 private:
  // Of one image: the convolution's outputs, and the sums of the batch norm behind it.
  void convolve(const ChainBackward<S>& call, int64_t image, S* convolved, std::vector<double>& sums) {
    NormArgs<S> a = this->behind_.planes(this->first_, this->channels_, 1, convolved);
    a.grad = call.grad + this->behind_.at(image, this->first_);
    a.mean = call.second->mean + this->first_;
    this->channels([&](int64_t c) {
      this->load(image, c);
      this->convolution_.forward(call.weights + c * this->taps_, convolved, nullptr);
      convolved += this->behind_.shape.inner;
    });
    add(a, sums);
  }

  // Of one image: through the batch norm behind the convolution, the convolution, the activation in front of it.
  void gradients(const ChainBackward<S>& call, int64_t image, const S* convolved, std::vector<double>& weights,
                 std::vector<double>& sums) {
    this->channels([&](int64_t c) {
      NormArgs<S> a = this->behind_.plane(c, convolved, this->windows_.out[1], this->convolution_.grad());
      a.grad = call.grad + this->behind_.at(image, c);
      a.mean = call.second->mean + c;
      table<S>().planes.grad_apply(a);
      if (call.grad_weights) {
        this->load(image, c);
        this->convolution_.grad_weight(weights.data() + (c - this->first_) * this->taps_);
      }
      if (call.grad_x) this->convolution_.grad_input(call.weights + c * this->taps_, call.grad_x + this->before_.at(image, c));
      convolved += this->behind_.shape.inner;
    });
    if (call.first && call.grad_x) add(first_norm(call, image, 1), sums);
  }

  // The batch norm in front of the convolution, in place.
  NormArgs<S> first_norm(const ChainBackward<S>& call, int64_t image, int64_t images) const {
    const int64_t at = this->before_.at(image, this->first_);
    NormArgs<S> a = this->before_.planes(this->first_, this->channels_, images, this->x_ + at);
    a.mean = call.first->mean + this->first_;
    a.grad = a.masked = a.out = call.grad_x + at;
    return a;
  }

  void add(const NormArgs<S>& a, std::vector<double>& sums) {
    table<S>().planes.grad_sums(a, sums.data(), sums.data() + this->channels_, this->scratch_.data());
  }

  void finish(Side<S>& side, const NormBackward<S>& call, const std::vector<double>& sums) {
    for (int64_t c = 0; c < this->channels_; ++c)
      finish_gradients(call, side.per, this->first_ + c, side.count(), sums[c], sums[this->channels_ + c]);
  }
};

// task(first channel, how many, the thread's convolution, its scratch of `per_channel` elements for each)
template <class S, class Run>
void run_channels(const ChainShape& shape, bool backward, int64_t per_channel, Run task) {
  const int64_t group = std::max<int64_t>(1, kRun / shape.windows.in_size());
  const bool parallel = shape.images * shape.channels * shape.windows.in_size() > kSerial;
  run_list(ceil_div(shape.channels, group), parallel, [&] {
    S* scratch = static_cast<S*>(scratch_of(static_cast<size_t>(group * per_channel) * sizeof(S) + 64));
    return [&, scratch, convolution = DepthwisePlane<S>(shape.windows, backward)](int64_t i) mutable {
      task(i * group, std::min(group, shape.channels - i * group), convolution, scratch);
    };
  });
}

}  // namespace

template <class S>
void chain_forward(const ChainShape& shape, const ChainForward<S>& call) {
  const Windows& w = shape.windows;
  Side<S> before(shape.images, shape.channels, w.in_size(), call.first_cap, call.first && call.first->training);
  Side<S> behind(shape.images, shape.channels, w.out_size(), call.second_cap, call.second->training);
  run_channels<S>(shape, false, 0, [&](int64_t first, int64_t channels, DepthwisePlane<S>& convolution, S*) {
    ForwardTask<S>(shape, before, behind, convolution, first, channels, call.x, call.first).run(call);
  });
}

template <class S>
void chain_backward(const ChainShape& shape, const ChainBackward<S>& call) {
  const Windows& w = shape.windows;
  Side<S> before(shape.images, shape.channels, w.in_size(), call.first_cap, call.first && call.first->training);
  Side<S> behind(shape.images, shape.channels, w.out_size(), call.second_cap, call.second->training);
  for (int64_t c = 0; c < shape.channels; ++c) {
    if (call.first) before.affine(*call.first, c);
    behind.affine(*call.second, c);
  }
  const int64_t outputs = shape.images * w.out_size();
  run_channels<S>(shape, true, outputs, [&](int64_t first, int64_t channels, DepthwisePlane<S>& convolution, S* convolved) {
    BackwardTask<S>(shape, before, behind, convolution, first, channels, call.x, call.first).run(call, convolved);
  });
}

template void chain_forward(const ChainShape&, const ChainForward<float>&);
template void chain_forward(const ChainShape&, const ChainForward<double>&);
template void chain_backward(const ChainShape&, const ChainBackward<float>&);
template void chain_backward(const ChainShape&, const ChainBackward<double>&);

}  // namespace sparseprop
