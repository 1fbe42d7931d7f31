// Batch 32, two threads of an EPYC (Zen 5), in training, forward / backward (ms); in brackets with the sums of each batch norm in
// a pass of their own and the convolution's two gradients apart, as it was before:
//   144 planes of 56x56             4.5 / 9.3 (5.8 / 15)    384 of 14x14  1.0 / 2.3 (1.6 / 4.3)
//    96 of 112x112, stride 2        7.5 / 16 (8.6 / 28)     960 of 7x7    1.4 / 3.5 (1.9 / 5.5)
// Small planes gain nothing by themselves; networks gain, as what surrounds them stays contiguous.
// Tried: whole planes normalized, then copied into their padding (5 % slower); small planes one by one in training (no
// difference in MobileNetV2's step); two rows of outputs at once, which saves a third of the loads (0 to 15 % slower), two padded
// planes in turn, so that no load waits for a store just done (no difference).
#include "chain_tasks.h"
#include "usual.h"

namespace sparseprop {
namespace {

template <class S>
class ForwardTask : ChainTask<S> {
 public:
  using ChainTask<S>::ChainTask;

  void run(const ChainForward<S>& call) {
    if (call.first) statistics(*call.first);
    if (!call.second->training) return finished(call);
    convolve(call);
    for (int64_t c = this->first_; c < this->first_ + this->channels_; ++c) this->behind_.affine(*call.second, c);
    S* const out = call.out + this->behind_.at(0, this->first_);
    NormArgs<S> a = this->behind_.planes(this->first_, this->channels_, this->images(), out);
    a.out = out;
    table<S>().planes.apply(a);
  }

 private:
  // The statistics of x if they are wanted, then what the batch norm in front does to each channel.
  void statistics(const NormForward<S>& call) {
    const int64_t first = this->first_, channels = this->channels_;
    ChainSide<S>& side = this->before_;
    if (call.training) {
      std::vector<S> close(channels);
      for (int64_t c = 0; c < channels; ++c) {
        const S* const plane = this->x_ + side.at(0, first + c);
        close[c] = usual<S>(this->windows_.in_size(), [&](int64_t i) { return plane[i]; });
      }
      std::vector<double> sums(2 * channels, 0.0);
      NormArgs<S> a = side.planes(first, channels, this->images(), this->x_ + side.at(0, first));
      a.mean = close.data();
      table<S>().planes.sums(a, sums.data(), sums.data() + channels, this->scratch_.data());
      for (int64_t c = 0; c < channels; ++c) finish_stats(call, first + c, side.count(), sums[c], sums[channels + c], close[c]);
    }
    for (int64_t c = first; c < first + channels; ++c) side.affine(call, c);
  }

  // With known statistics each plane is finished on its way into memory.
  void finished(const ChainForward<S>& call) {
    this->channels([&](int64_t c) { this->behind_.affine(*call.second, c); });
    for (int64_t image = 0; image < this->images(); ++image) {
      this->channels([&](int64_t c) {
        const ChannelFinish<S> finish = this->behind_.finish(c);
        this->load(image, c);
        this->convolution_.forward(call.weights + c * this->taps_, call.out + this->behind_.at(image, c), &finish, nullptr);
      });
    }
  }

  // Outputs, not normalized, and their statistics.
  void convolve(const ChainForward<S>& call) {
    const int64_t first = this->first_, images = this->images();
    Partials<S> sums(this->channels_, 2, this->windows_.out);
    std::vector<S> close(this->channels_);
    for (int64_t image = 0; image < images; ++image) {
      this->channels([&](int64_t c) {
        const S* const weights = call.weights + c * this->taps_;
        this->load(image, c);
        if (image == 0) close[c - first] = this->convolution_.usual_output(weights);
        const NormSums<S> wanted = {nullptr, this->behind_.ahead(image), {}, close[c - first], sums.vectors(c - first)};
        this->convolution_.forward(weights, call.out + this->behind_.at(image, c), nullptr, &wanted);
      });
      sums.add_up(image + 1 == images);
    }
    this->channels([&](int64_t c) {
      finish_stats(*call.second, c, this->behind_.count(), sums.sum(c - first, 0), sums.sum(c - first, 1), close[c - first]);
    });
  }
};

template <class S>
class BackwardTask : ChainTask<S> {
 public:
  using ChainTask<S>::ChainTask;

  // `convolved` has room for the convolution's outputs of these channels, in all images.
  void run(const ChainBackward<S>& call, S* convolved) {
    convolve(call, convolved);
    gradients(call, convolved);
    if (call.first && call.grad_x) table<S>().planes.grad_apply(first_norm(call));
  }

 private:
  // The convolution's outputs, and what the gradient of the batch norm behind it needs of all images.
  void convolve(const ChainBackward<S>& call, S* convolved) {
    const int64_t first = this->first_, images = this->images();
    Partials<S> sums(this->channels_, 2, this->windows_.out);
    for (int64_t image = 0; image < images; ++image) {
      this->channels([&](int64_t c) {
        const NormSums<S> wanted = {call.grad + this->behind_.at(image, c), this->behind_.ahead(image), this->behind_.finish(c),
                                    call.second->mean[c], sums.vectors(c - first)};
        this->load(image, c);
        this->convolution_.forward(call.weights + c * this->taps_, convolved, nullptr, &wanted);
        convolved += this->behind_.shape.inner;
      });
      sums.add_up(image + 1 == images);
    }
    finish(this->behind_, *call.second, sums);
  }

  // Through the batch norm behind the convolution, the convolution, the activation in front of it.
  void gradients(const ChainBackward<S>& call, const S* convolved) {
    const int64_t first = this->first_, taps = this->taps_, images = this->images();
    Partials<S> sums(this->channels_, 2 + taps, this->windows_.in);
    std::vector<S> nowhere(call.grad_x ? 0 : this->before_.shape.inner);
    for (int64_t image = images; image-- > 0;) {  // backwards: the last images are still in the cache
      const int64_t ahead = image > 0 ? -this->before_.at(1, 0) : 0;
      this->channels([&](int64_t c) {
        NormArgs<S> a = this->behind_.plane(c, convolved + (image * this->channels_ + c - first) * this->behind_.shape.inner,
                                            this->windows_.out[1], this->convolution_.grad());
        a.grad = call.grad + this->behind_.at(image, c);
        a.mean = call.second->mean + c;
        table<S>().planes.grad_apply(a);
        const int64_t at = this->before_.at(image, c);
        S* const vectors = sums.vectors(c - first);
        const NormSums<S> front = {nullptr, 0, this->front(c), call.first ? call.first->mean[c] : S(0), vectors};
        this->convolution_.backward(call.weights + c * taps, this->x_ + at, ahead, call.grad_x ? call.grad_x + at : nowhere.data(),
                                    front, vectors + 2 * lanes<S>());
      });
      sums.add_up(image == 0);
    }
    for (int64_t c = 0; call.grad_weights && c < this->channels_; ++c)
      for (int64_t t = 0; t < taps; ++t) call.grad_weights[(first + c) * taps + t] = static_cast<S>(sums.sum(c, 1 + taps - t));
    if (call.first) finish(this->before_, *call.first, sums);
  }

  // The batch norm in front of the convolution, in place.
  NormArgs<S> first_norm(const ChainBackward<S>& call) const {
    const int64_t at = this->before_.at(0, this->first_);
    NormArgs<S> a = this->before_.planes(this->first_, this->channels_, this->images(), this->x_ + at);
    a.mean = call.first->mean + this->first_;
    a.grad = a.masked = a.out = call.grad_x + at;
    return a;
  }

  // From the first two sums of each channel.
  void finish(ChainSide<S>& side, const NormBackward<S>& call, const Partials<S>& sums) {
    for (int64_t c = 0; c < this->channels_; ++c)
      finish_gradients(call, side.per, this->first_ + c, side.count(), sums.sum(c, 0), sums.sum(c, 1));
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
  if (call.first) known_stats(*call.first, shape.channels);
  known_stats(*call.second, shape.channels);
  ChainSide<S> before(shape.images, shape.channels, w.in_size(), call.first_cap, call.first && call.first->training);
  ChainSide<S> behind(shape.images, shape.channels, w.out_size(), call.second_cap, call.second->training);
  run_channels<S>(shape, false, 0, [&](int64_t first, int64_t channels, DepthwisePlane<S>& convolution, S*) {
    ForwardTask<S>(shape, before, behind, convolution, first, channels, call.x, call.first).run(call);
  });
}

template <class S>
void chain_backward(const ChainShape& shape, const ChainBackward<S>& call) {
  const Windows& w = shape.windows;
  ChainSide<S> before(shape.images, shape.channels, w.in_size(), call.first_cap, call.first && call.first->training);
  ChainSide<S> behind(shape.images, shape.channels, w.out_size(), call.second_cap, call.second->training);
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
