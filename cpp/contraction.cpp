#include "contraction.h"

#include "bitmap.h"
#include "run.h"

namespace sparseprop {
namespace {

// Starting threads pays above this much work, in multiply-adds.
constexpr double kSerialWork = 1 << 19;
constexpr size_t kCached = 6;
// Measured on Linear layers of 768 to 4096 features: forward 5 to 20 % faster from 10 % density down, backward 5 to 15 %
// from 2 %; on images (rows copied in shorter pieces) slower everywhere.
// Backward, a segment loads two rows and stores one: 16 is 3 to 5 % faster than 8 on Linear and 1x1 layers, but 0 to 4 %
// slower on 3x3 ones, whose blocks have longer rows.
constexpr double kSegment = 8, kSegmentBackward = 16;
// Of columns without a halo: layers of 64 to 1024 channels, batch 1 to 64, at 4x4, 7x7, 14x14 and 28x28. Backward would pay from
// 4 on with warm caches (512->512 3x3 @7, 10 % density, 7.5 -> 5.9 ms), and loses 0 to 4 % there with cold ones.
constexpr double kCopyingForward = 7, kCopyingBackward = 8;
constexpr double kHalfTileForward = 0.12, kHalfTileBackward = 0.03;

bool worth_threads(const Layer& layer, const Lowered& low, int64_t nnz, int64_t lanes) {
  const double columns = double(low.grid.columns);
  const double padded = double(ceil_div(low.grid.columns, lanes) * lanes);  // kernels work on whole vectors
  return double(nnz) * padded + kMoveWork * columns * double(layer.in_channels + layer.out_channels) > kSerialWork;
}

// work(S(), A()): the types of values and sums, and of activations.
template <class Work>
void with_types(DType dtype, Work work) {
  switch (dtype) {
    case DType::float64: return work(double(), double());
    case DType::float32: return work(float(), float());
    case DType::bfloat16: return work(float(), bf16());
  }
}

ptrdiff_t vector_of(DType dtype, const Kernels& table) { return dtype == DType::float64 ? table.f64.vector : table.f32.vector; }

bool batch_last(const Strides& strides, int64_t batch) { return batch > 1 && strides[0] == 1; }

Lowered lowered_pattern(const Layer& layer, const PatternRef& pattern, Direction direction, const Sizes& sizes,
                        int64_t element_size, int64_t lanes) {
  const Grid padded = make_grid(layer, sizes, lanes);
  const int64_t phases = static_cast<int64_t>(padded.phases.size()), inner = layer.in_channels * phases;
  const bool by_rows = direction == Direction::backward && goes_by_rows(padded, element_size);
  const bool forward = direction == Direction::forward || by_rows;  // the pattern, else its transposed
  const double nnz = double(pattern.nnz);
  const Problem problem =
      forward ? Problem{layer.out_channels, inner, 1, phases, nnz, kSegment, kHalfTileForward, true, kCopyingForward}
              : Problem{inner, layer.out_channels, phases, 1, nnz, padded.max_shift == 0 ? kSegmentBackward : kSegment,
                        kHalfTileBackward, false, kCopyingBackward};
  const std::vector<Tap> taps = forward ? make_taps(layer, padded) : mirrored_taps(layer, padded);
  const Grid compact = compact_grid(sizes.batch, forward ? sizes.out : sizes.in);
  std::optional<Schedule> schedule;
  if (by_rows) {
    schedule = make_row_schedule(padded, problem, element_size);
  } else if (compact.columns > 0 && may_compact(layer, padded, forward)) {
    schedule = make_compact_schedule(padded, compact, forward ? Triple{} : sizes.padding, taps, problem, element_size);
  }
  if (!schedule) schedule = make_schedule(layer, padded, taps, problem, element_size);
  const bool shifted = schedule->shifted.pitch > 0;
  const std::vector<Tap>& at = shifted ? schedule->shifted.taps : taps;
  std::vector<uint32_t> canonical;
  Stream stream(forward ? forward_entries(layer, pattern, at, shifted ? 1 : phases) : backward_entries(layer, pattern, padded, at),
                schedule->stream, canonical);
  Exchange exchange;
  if (!forward) exchange = Exchange(layer, padded, pattern, stream, canonical, element_size);
  const Grid& grid = schedule->compact.used() ? compact : padded;
  return {direction, element_size, sizes, padded, grid, *schedule, by_rows, std::move(stream), std::move(exchange)};
}

}  // namespace

Contraction::Contraction(const Layer& layer, const int64_t* row_ptr, const int32_t* col_idx, int64_t nnz)
    : layer_(layer), pattern_{row_ptr, col_idx, nnz} {
  check_indices(layer_, pattern_);
}

Contraction::Contraction(const Layer& layer, const PackedNM& packed)
    : layer_(layer), pattern_{nullptr, nullptr, unpack_nm(layer, packed).ref().nnz}, packed_(packed) {}

std::shared_ptr<const Lowered> Contraction::lower(Direction direction, const Sizes& sizes, int64_t element_size,
                                                  int64_t lanes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = cache_.rbegin(); it != cache_.rend(); ++it) {
    const Lowered& l = **it;
    if (l.direction == direction && l.sizes == sizes && l.element_size == element_size && l.grid.lanes == lanes) {
      auto found = *it;
      if (it != cache_.rbegin()) {
        cache_.erase(std::next(it).base());
        cache_.push_back(found);
      }
      return found;
    }
  }
  const Csr unpacked = packed_ ? unpack_nm(layer_, *packed_) : Csr{};
  const PatternRef pattern = packed_ ? unpacked.ref() : pattern_;
  check_indices(layer_, pattern);  // the borrowed arrays may have changed since
  auto lowered = std::make_shared<const Lowered>(lowered_pattern(layer_, pattern, direction, sizes, element_size, lanes));
  if (cache_.size() >= kCached) cache_.erase(cache_.begin());
  cache_.push_back(lowered);
  return lowered;
}

std::shared_ptr<const RowBits> Contraction::row_bits() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!bits_) {
    const Csr unpacked = packed_ ? unpack_nm(layer_, *packed_) : Csr{};
    const PatternRef pattern = packed_ ? unpacked.ref() : pattern_;
    check_indices(layer_, pattern);
    bits_ = std::make_shared<const RowBits>(layer_, pattern);
  }
  return bits_;
}

int64_t Contraction::storage_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = bits_ ? bits_->storage_bytes() : 0;
  for (const auto& l : cache_) bytes += l->stream.storage_bytes() + l->exchange.storage_bytes();
  return bytes;
}

void Contraction::forward(DType dtype, const Sizes& sizes, TensorRef x, const void* values, const void* bias,
                          TensorRef out, const Finish* finish) {
  if (finish && dtype == DType::bfloat16) throw std::invalid_argument("a forward pass in bfloat16 cannot be finished.");
  const Kernels& table = active_kernels();
  if (!finish && goes_by_bits(layer_, sizes, pattern_.nnz, Direction::forward, vector_of(dtype, table))) {
    const auto bits = row_bits();
    return with_types(dtype, [&](auto s, auto a) {
      using S = decltype(s);
      bitmap_forward<S, decltype(a)>({layer_, *bits, sizes.batch, table}, x, static_cast<const S*>(values),
                                     static_cast<const S*>(bias), out, true);
    });
  }
  const int64_t element = dtype == DType::float64 ? 8 : 4;
  const int64_t lanes = choose_lanes(sizes, element, batch_last(x.strides, sizes.batch));
  const auto low = lower(Direction::forward, sizes, element, lanes);
  const bool parallel = worth_threads(layer_, *low, pattern_.nnz, 64 / element);
  with_types(dtype, [&](auto s, auto a) {
    using S = decltype(s);
    run_forward<S, decltype(a)>({layer_, sizes, *low, table}, x, static_cast<const S*>(values), static_cast<const S*>(bias), out,
                                finish, parallel);
  });
}

void Contraction::backward(DType dtype, const Sizes& sizes, TensorRef x, const void* values, TensorRef grad_out,
                           TensorRef grad_in, TensorRef added, void* grad_values, void* grad_bias) {
  const Kernels& table = active_kernels();
  const bool by_bits = goes_by_bits(layer_, sizes, pattern_.nnz, Direction::backward, vector_of(dtype, table));
  const int64_t element = dtype == DType::float64 ? 8 : 4;
  const int64_t lanes = choose_lanes(sizes, element, batch_last(grad_out.strides, sizes.batch));
  const auto bits = by_bits ? row_bits() : nullptr;
  const auto low = by_bits ? nullptr : lower(Direction::backward, sizes, element, lanes);
  with_types(dtype, [&](auto s, auto a) {
    using S = decltype(s);
    using A = decltype(a);
    const Gradients<S> grads{grad_in, added, static_cast<S*>(grad_values), static_cast<S*>(grad_bias)};
    if (by_bits) {
      return bitmap_backward<S, A>({layer_, *bits, sizes.batch, table}, x, static_cast<const S*>(values), grad_out, grads, true);
    }
    const Call<S, A> call{layer_, sizes, *low, table};
    (low->by_rows ? run_backward_rows<S, A> : run_backward<S, A>)(call, x, static_cast<const S*>(values), grad_out, grads,
                                                                  worth_threads(layer_, *low, pattern_.nnz, 64 / element));
  });
}

}  // namespace sparseprop
