#include "contraction.h"

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
constexpr double kHalfTileForward = 0.12, kHalfTileBackward = 0.03;

bool worth_threads(const Layer& layer, const Lowered& low, int64_t nnz, int64_t lanes) {
  const double columns = double(low.grid.columns);
  const double padded = double(ceil_div(low.grid.columns, lanes) * lanes);  // kernels work on whole vectors
  return double(nnz) * padded + kMoveWork * columns * double(layer.in_channels + layer.out_channels) > kSerialWork;
}

template <class S, class A>
void run(const Call<S, A>& call, TensorRef x, const S* values, TensorRef grad_out, const Gradients<S>& grads, bool parallel) {
  (call.low.by_rows ? run_backward_rows<S, A> : run_backward<S, A>)(call, x, values, grad_out, grads, parallel);
}

bool batch_last(const Strides& strides, int64_t batch) { return batch > 1 && strides[0] == 1; }

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
  const Grid grid = make_grid(layer_, sizes, lanes);
  const int64_t phases = static_cast<int64_t>(grid.phases.size()), inner = layer_.in_channels * phases;
  const bool by_rows = direction == Direction::backward && goes_by_rows(grid, element_size);
  const bool forward = direction == Direction::forward || by_rows;  // the pattern, else its transposed
  const Problem problem = forward ? Problem{layer_.out_channels, inner, 1, phases, double(pattern_.nnz), kSegment, kHalfTileForward}
                                  : Problem{inner, layer_.out_channels, phases, 1, double(pattern_.nnz),
                                            grid.max_shift == 0 ? kSegmentBackward : kSegment, kHalfTileBackward};
  const Schedule schedule = by_rows ? make_row_schedule(grid, problem, element_size) : make_schedule(layer_, grid, problem, element_size);
  std::vector<uint32_t> canonical;
  Stream stream(forward ? forward_entries(layer_, pattern, grid) : backward_entries(layer_, pattern, grid), schedule.stream, canonical);
  Exchange exchange;
  if (!forward) exchange = Exchange(layer_, pattern, stream, canonical, element_size);
  auto lowered = std::make_shared<const Lowered>(
      Lowered{direction, element_size, sizes, grid, schedule, by_rows, std::move(stream), std::move(exchange)});
  if (cache_.size() >= kCached) cache_.erase(cache_.begin());
  cache_.push_back(lowered);
  return lowered;
}

int64_t Contraction::storage_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = 0;
  for (const auto& l : cache_) bytes += l->stream.storage_bytes() + l->exchange.storage_bytes();
  return bytes;
}

void Contraction::forward(DType dtype, const Sizes& sizes, TensorRef x, const void* values, const void* bias,
                          TensorRef out, const Finish* finish) {
  if (finish && dtype == DType::bfloat16) throw std::invalid_argument("a forward pass in bfloat16 cannot be finished.");
  const int64_t element = dtype == DType::float64 ? 8 : 4;
  const int64_t lanes = choose_lanes(sizes, element, batch_last(x.strides, sizes.batch));
  const auto low = lower(Direction::forward, sizes, element, lanes);
  const bool parallel = worth_threads(layer_, *low, pattern_.nnz, 64 / element);
  const Kernels& table = active_kernels();
  if (dtype == DType::float64) {
    run_forward<double, double>({layer_, sizes, *low, table}, x, static_cast<const double*>(values),
                                static_cast<const double*>(bias), out, finish, parallel);
  } else if (dtype == DType::float32) {
    run_forward<float, float>({layer_, sizes, *low, table}, x, static_cast<const float*>(values),
                              static_cast<const float*>(bias), out, finish, parallel);
  } else {
    run_forward<float, bf16>({layer_, sizes, *low, table}, x, static_cast<const float*>(values),
                             static_cast<const float*>(bias), out, nullptr, parallel);
  }
}

void Contraction::backward(DType dtype, const Sizes& sizes, TensorRef x, const void* values, TensorRef grad_out,
                           TensorRef grad_in, TensorRef added, void* grad_values, void* grad_bias) {
  const int64_t element = dtype == DType::float64 ? 8 : 4;
  const int64_t lanes = choose_lanes(sizes, element, batch_last(grad_out.strides, sizes.batch));
  const auto low = lower(Direction::backward, sizes, element, lanes);
  const bool parallel = worth_threads(layer_, *low, pattern_.nnz, 64 / element);
  const Kernels& table = active_kernels();
  if (dtype == DType::float64) {
    const Gradients<double> grads{grad_in, added, static_cast<double*>(grad_values), static_cast<double*>(grad_bias)};
    run<double, double>({layer_, sizes, *low, table}, x, static_cast<const double*>(values), grad_out, grads, parallel);
    return;
  }
  const Gradients<float> grads{grad_in, added, static_cast<float*>(grad_values), static_cast<float*>(grad_bias)};
  if (dtype == DType::float32) {
    run<float, float>({layer_, sizes, *low, table}, x, static_cast<const float*>(values), grad_out, grads, parallel);
  } else {
    run<float, bf16>({layer_, sizes, *low, table}, x, static_cast<const float*>(values), grad_out, grads, parallel);
  }
}

}  // namespace sparseprop
