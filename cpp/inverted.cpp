// MobileNetV2 at 90 %, two threads of a Zen 5, beside layer, chain and layer as calls of their own: batch 32 123 -> 69 ms.
// A single image is shared out within each step, always by rows of pixels: as layers are, so that what a core wrote it
// reads (depthwise convolutions by planes: 3.8 ms in all blocks, no faster than one thread; by rows 2.1 to 2.4).
// Tried: bands of rows through the whole block, for images of 3 MB and more (one image 25 % faster there, 3 % in all; batches 5 %
// slower).
#include "inverted.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>

#include "run.h"

namespace sparseprop {
namespace {

constexpr int64_t kGroup = 512 << 10;  // bytes between the layers of images that go together, if more than one does

// Planes with their padding, one after the other: a row's right padding is the next one's left, a plane's lower padding the
// next one's upper. The first row's padding and what the last window may read lie around them all.
struct PaddedPlanes {
  int64_t height, width, pitch, plane, before, behind;

  PaddedPlanes(const Windows& w, int64_t lanes)
      : height(w.in[0]), width(w.in[1]), pitch(w.in[1] + w.padding[1]), plane((w.in[0] + w.padding[0]) * pitch),
        before(w.padding[0] * pitch + w.padding[1]), behind(before + w.stride[1] * lanes) {}

  int64_t size(int64_t planes) const { return before + planes * plane + behind; }

  // Zeros behind some rows of a plane, and below it with its last row; those above the first plane are `before`.
  template <class S>
  void clear_behind(S* data, Range rows) const {
    for (int64_t r = rows.begin; r < rows.end; ++r) std::fill_n(data + r * pitch + width, pitch - width, S(0));
    if (rows.end == height) std::fill_n(data + height * pitch, plane - height * pitch, S(0));
  }
};

template <class S>
class Block {
 public:
  explicit Block(const InvertedBlock& block)
      : block_(block), padded_(block.windows, lanes<S>()), inner_(block.norm, block.channels),
        last_(block.project.norm, block.project.layer.layer().out_channels) {
    if (block.expand) first_.emplace(block.expand->norm, block.channels);
  }

  int64_t image_bytes() const { return block_.channels * (padded_.plane + block_.windows.out_size()) * int64_t(sizeof(S)); }
  size_t scratch_bytes(int64_t images) const {
    return static_cast<size_t>(padded_.size(images * block_.channels) + images * block_.channels * block_.windows.out_size() + 2 * 64) * sizeof(S);
  }

  // `fresh`: the scratch holds no padding yet.
  void run(Range images, void* scratch, bool fresh) const {
    const int64_t planes = images.size() * block_.channels;
    S* const convolved = static_cast<S*>(scratch);
    S* const data = convolved + ceil_div(planes * block_.windows.out_size(), 64) * 64 + padded_.before;
    if (fresh) {
      std::fill_n(data - padded_.before, padded_.before, S(0));
      for_bands(planes, block_.windows.in[0], [&](int64_t p, Range rows) { padded_.clear_behind(data + p * padded_.plane, rows); });
    }
    expand(images, data);
    for_bands(planes, block_.windows.out[0], [&](int64_t p, Range rows) {
      convolve(p, rows, data + p * padded_.plane, convolved + p * block_.windows.out_size());
    });
    project(images, convolved);
  }

 private:
  // task(plane, some of its rows), the same rows of all planes by one thread.
  template <class Task>
  void for_bands(int64_t planes, int64_t rows, Task task) const {
    const int64_t threads = team_size(planes * block_.windows.in_size() > kSerial);
    const int64_t bands = threads == 1 ? 1 : std::min(rows, 2 * threads);
    run_each(bands, threads > 1, [&](int64_t i) {
      for (int64_t p = 0; p < planes; ++p) task(p, share(rows, bands, i));
    });
  }

  // Some rows of a plane.
  void convolve(int64_t plane, Range rows, const S* data, S* out) const {
    const int64_t c = plane % block_.channels;
    const Windows& w = block_.windows;
    const ChannelFinish<S> finish = channel_finish(inner_.scale[c], inner_.shift[c], block_.norm.cap);
    kernels_of<S>(active_kernels()).depthwise(
        {data - padded_.before + rows.begin * w.stride[0] * padded_.pitch, padded_.pitch, w.kernel[0], w.kernel[1], w.stride[0], w.stride[1],
         static_cast<const S*>(block_.weights) + c * w.taps(), out + rows.begin * w.out[1], w.out[1], rows.size(), w.out[1], &finish,
         nullptr});
  }

  void expand(Range images, S* data) const {
    const Windows& w = block_.windows;
    const int64_t channels = block_.channels;
    const Strides into = {channels * padded_.plane, padded_.plane, 0, padded_.pitch, 1};
    if (block_.expand) {
      layer(*block_.expand, *first_, images, static_cast<const S*>(block_.x), data, into);
      return;
    }
    const S* x = static_cast<const S*>(block_.x) + images.begin * channels * w.in_size();
    for_bands(images.size() * channels, w.in[0], [&](int64_t p, Range rows) {
      kernels_of<S>(active_kernels()).move.copy(data + p * padded_.plane + rows.begin * padded_.pitch, {padded_.pitch, 1},
                                                x + p * w.in_size() + rows.begin * w.in[1], {w.in[1], 1}, rows.size(), w.in[1]);
    });
  }

  static Strides contiguous(int64_t channels, const Triple& size) {
    const int64_t plane = size[0] * size[1] * size[2];
    return {channels * plane, plane, size[1] * size[2], size[2], 1};
  }

  // x is that of all images, out of these.
  static void layer(const SparseStep& step, const FoldedNorm<S>& norm, Range images, const S* x, S* out, const Strides& to) {
    const Layer& layer = step.layer.layer();
    Sizes sizes = step.sizes;
    sizes.batch = images.size();
    const Strides from = contiguous(layer.in_channels, sizes.in);
    const Finish finish = {norm.scale.data(), norm.shift.data(), step.norm.cap, {nullptr, {}}};
    step.layer.forward(sizeof(S) == 8 ? DType::float64 : DType::float32, sizes,
                       {const_cast<S*>(x + images.begin * from[0]), from}, step.values, step.bias, {out, to}, &finish);
  }

  void project(Range images, const S* convolved) const {
    const Strides to = contiguous(block_.project.layer.layer().out_channels, block_.project.sizes.out);
    const int64_t image = block_.channels * block_.windows.out_size();
    layer(block_.project, last_, images, convolved - images.begin * image, static_cast<S*>(block_.out) + images.begin * to[0], to);
  }

  const InvertedBlock& block_;
  const PaddedPlanes padded_;
  std::optional<FoldedNorm<S>> first_;
  const FoldedNorm<S> inner_, last_;
};

}  // namespace

template <class S>
void run_block(const InvertedBlock& call) {
  const Block<S> block(call);
  const int64_t threads = team_size(true), group = std::clamp<int64_t>(kGroup / block.image_bytes(), 1, call.images);
  // Groups of images for each thread; what is left over is shared out layer by layer.
  const int64_t each = call.images / group / threads * threads, done = each * group;
  if (each > 0) {
    run_list(each, true, [&] {
      return [&, scratch = std::make_shared<CallScratch>(block.scratch_bytes(group)), fresh = true](int64_t i) mutable {
        block.run({i * group, (i + 1) * group}, scratch->data, fresh);
        fresh = false;
      };
    });
  }
  for (int64_t i = done; i < call.images; i += group) {
    const Range images = {i, std::min(i + group, call.images)};
    const CallScratch scratch(block.scratch_bytes(group));
    block.run(images, scratch.data, true);
  }
}

template void run_block<float>(const InvertedBlock&);
template void run_block<double>(const InvertedBlock&);

}  // namespace sparseprop
