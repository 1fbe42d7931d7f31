#include "contraction.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

#include "arena.h"
#include "schedule.h"

namespace sparseprop {

struct Contraction::Lowered {
  Direction direction;
  int64_t element_size;
  Sizes sizes;
  Grid grid;
  Schedule schedule;
  Stream stream;
};

namespace {

constexpr size_t kKeepScratch = size_t{64} << 20;
constexpr double kSerialWork = 1 << 19;  // multiply-adds below which starting threads costs more than it saves
constexpr size_t kCached = 6;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Arena& thread_arena() {
  thread_local Arena arena;
  return arena;
}

Arena& call_arena() {
  thread_local Arena arena;
  return arena;
}

// Hands out consecutive, 64-byte aligned pieces of one reservation.
class Pieces {
 public:
  template <class S>
  size_t add(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(S) + 127) / 64 * 64;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

template <class S>
S* at(void* base, size_t offset) {
  return reinterpret_cast<S*>(static_cast<char*>(base) + offset);
}

// Runs task(i, scratch) for i < tasks, statically over torch's threads; the result never depends on their number.
template <class Task>
void run_tasks(int64_t tasks, bool parallel, size_t scratch_bytes, Task task) {
  std::atomic<bool> out_of_memory{false};
  auto run = [&](int64_t i) {
    void* scratch = thread_arena().reserve(scratch_bytes);
    if (scratch == nullptr) {
      out_of_memory.store(true);
    } else {
      task(i, scratch);
    }
  };
  if (parallel && tasks > 1 && omp_get_max_threads() > 1 && !omp_in_parallel()) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < tasks; ++i) run(i);
  } else {
    for (int64_t i = 0; i < tasks; ++i) run(i);
  }
  if (out_of_memory.load()) throw std::bad_alloc();
}

struct Range {
  int64_t begin, end;
};

Range share(int64_t total, int64_t pieces, int64_t i) { return {total * i / pieces, total * (i + 1) / pieces}; }

// Row groups per chunk so that every thread gets nearly the same number of (chunk, group) tasks.
int64_t row_groups(int64_t chunks, int64_t parts) {
  const int64_t threads = omp_get_max_threads();
  for (int64_t g = 1; g < parts; ++g) {
    const int64_t tasks = chunks * g;
    if (10 * ceil_div(tasks, threads) * threads <= 11 * tasks) return g;
  }
  return std::max<int64_t>(1, parts);
}

template <class S, class A>
struct Call {
  const Layer& layer;
  const Sizes& sizes;
  const Contraction::Lowered& low;
  const Kernels& table;

  const KernelsOf<S>& kernels() const { return kernels_of<S>(table); }
  int64_t lane_groups(int64_t columns) const { return ceil_div(columns, lanes<S>()); }
  Columns chunk(int64_t c) const {
    const int64_t begin = c * low.schedule.chunk;
    return {begin, std::min(begin + low.schedule.chunk, low.grid.columns)};
  }
  // Padded to whole vectors, so that kernels never see what an earlier call left.
  static Columns padded(Columns columns) {
    return {columns.begin, columns.begin + ceil_div(columns.end - columns.begin, lanes<S>()) * lanes<S>()};
  }
};

template <class S, class A>
void run_forward(const Call<S, A>& call, TensorRef x, const S* values, const S* bias, TensorRef out, bool parallel) {
  const Contraction::Lowered& low = call.low;
  const Grid& grid = low.grid;
  const Schedule& plan = low.schedule;
  const Stream& stream = low.stream;
  const int64_t parts = static_cast<int64_t>(stream.parts().size()), phases = static_cast<int64_t>(grid.phases.size());
  const int64_t groups = parallel ? row_groups(plan.chunks, parts) : 1;
  const Placement place_out = place_output(call.sizes, grid, out.strides);

  Pieces pieces;
  const size_t panel_at = pieces.add<S>(plan.panel_size), tile_at = pieces.add<S>(stream.max_part_rows() * plan.chunk);
  run_tasks(plan.chunks * groups, parallel, pieces.bytes(), [&](int64_t task, void* scratch) {
    const Columns columns = call.chunk(task / groups), padded = call.padded(columns);
    const int64_t width = padded.end - padded.begin;
    S* panel = at<S>(scratch, panel_at);
    S* tile = at<S>(scratch, tile_at);
    PanelShape shape = plan.panel;
    shape.row_pitch *= phases;
    for (int64_t f = 0; f < phases; ++f) {
      const Placement place = place_input(call.layer, call.sizes, grid, x.strides, grid.phases[f]);
      pack<A, S>(call.table, grid, place, static_cast<const A*>(x.data), 0, call.layer.in_channels,
           {padded.begin, padded.end + grid.max_shift}, panel + f * plan.panel.row_pitch, shape);
    }
    const Range mine = share(parts, groups, task % groups);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const Stream::Part part = stream.parts()[p];
      for (int64_t j = 0; j < width; j += plan.tile) {
        const int64_t vectors = call.lane_groups(std::min(plan.tile, width - j));
        for (int64_t b = 0; b < stream.blocks(); ++b) {
          call.kernels().forward[vectors - 1]({stream.block(p, b), values, bias ? bias + part.row : nullptr,
                                        panel + plan.panel.at(j) + stream.panel_row(b) * plan.panel.row_pitch,
                                        plan.stream.unit_log2, tile + j, plan.chunk});
        }
      }
      unpack<S, A>(call.table, grid, place_out, static_cast<A*>(out.data), part.row, part.rows, columns, tile,
             plan.chunk);
    }
  });
}

template <class S>
struct Gradients {
  TensorRef in;
  S* values;
  S* bias;
};

// Columns are cut into `splits` ranges with a partial weight gradient each: a number that depends on the problem
// alone, so that results do not depend on the thread count.
int64_t column_splits(int64_t chunks, int64_t nnz, size_t element) {
  const int64_t splits = chunks >= 8 ? 4 : chunks >= 2 ? 2 : 1;
  return static_cast<size_t>(nnz) * element * splits <= (size_t{256} << 20) ? splits : 1;
}

template <class S, class A>
class BackwardRun {
 public:
  BackwardRun(const Call<S, A>& call, TensorRef x, TensorRef grad_out, const Gradients<S>& grads, S* values_t, S* dots,
              S* bias_sums, int64_t splits, int64_t groups)
      : call_(call), x_(x), grad_out_(grad_out), grads_(grads), values_(values_t), dots_(dots), bias_sums_(bias_sums),
        splits_(splits), groups_(groups), low_(call.low), plan_(call.low.schedule), grid_(call.low.grid) {
    panel_at_ = pieces_.add<S>(plan_.panel_size);
    const int64_t tile = low_.stream.max_part_rows() * plan_.chunk;
    x_at_ = pieces_.add<S>(grads.values ? tile : 0);
    grad_x_at_ = pieces_.add<S>(grads.in.data ? tile : 0);
  }

  size_t scratch_bytes() const { return pieces_.bytes(); }
  int64_t tasks() const { return splits_ * groups_; }

  void operator()(int64_t task, void* scratch) const {
    const int64_t split = task / groups_, group = task % groups_;
    const Range chunks = share(plan_.chunks, splits_, split);
    const Range parts = share(static_cast<int64_t>(low_.stream.parts().size()), groups_, group);
    S* panel = at<S>(scratch, panel_at_);
    for (int64_t c = chunks.begin; c < chunks.end; ++c) {
      const Columns columns = call_.chunk(c), padded = call_.padded(columns);
      const Placement place = place_output(call_.sizes, grid_, grad_out_.strides);
      pack<A, S>(call_.table, grid_, place, static_cast<const A*>(grad_out_.data), 0, call_.layer.out_channels,
           {padded.begin - grid_.max_shift, padded.end}, panel, plan_.panel);
      if (bias_sums_ && group == 0) sum_bias(panel, padded.end - padded.begin, split);
      if (!grads_.in.data && !grads_.values) continue;
      for (int64_t p = parts.begin; p < parts.end; ++p) one_part(p, columns, padded, panel, scratch, split, c == chunks.begin);
    }
  }

 private:
  void sum_bias(const S* panel, int64_t width, int64_t split) const {
    const int64_t rows = call_.layer.out_channels, step = plan_.panel.tile == plan_.panel.tile_pitch ? width : plan_.tile;
    for (int64_t j = 0; j < width; j += step) {
      call_.kernels().row_sums(bias_sums_ + split * rows, panel + plan_.panel.at(j) + grid_.max_shift,
                               plan_.panel.row_pitch, rows, std::min(step, width - j));
    }
  }

  void one_part(int64_t p, Columns columns, Columns padded, const S* panel, void* scratch, int64_t split, bool fresh) const {
    const Stream& stream = low_.stream;
    const Stream::Part part = stream.parts()[p];
    const int64_t phases = static_cast<int64_t>(grid_.phases.size()), width = padded.end - padded.begin;
    const int64_t channel = part.row / phases, channels = part.rows / phases;
    S* x = grads_.values ? at<S>(scratch, x_at_) : nullptr;
    S* grad_x = grads_.in.data ? at<S>(scratch, grad_x_at_) : nullptr;
    const PanelShape rows = {plan_.chunk * phases, plan_.tile, plan_.tile};
    for (int64_t f = 0; x && f < phases; ++f) {
      const Placement place = place_input(call_.layer, call_.sizes, grid_, x_.strides, grid_.phases[f]);
      pack<A, S>(call_.table, grid_, place, static_cast<const A*>(x_.data), channel, channels, padded,
           x + f * plan_.chunk, rows);
    }
    for (int64_t j = 0; j < width; j += plan_.tile) {
      const int64_t vectors = call_.lane_groups(std::min(plan_.tile, width - j));
      for (int64_t b = 0; b < stream.blocks(); ++b) {
        S* dots = x ? dots_ + split * stream.nnz() + stream.first_nonzero(p, b) : nullptr;
        call_.kernels().backward[vectors - 1](
            {stream.block(p, b), values_, panel + plan_.panel.at(j) + stream.panel_row(b) * plan_.panel.row_pitch,
             plan_.stream.unit_log2, x ? x + j : nullptr, grad_x ? grad_x + j : nullptr, plan_.chunk, dots,
             !fresh || j > 0});
      }
    }
    if (!grad_x) return;
    for (int64_t f = 0; f < phases; ++f) store_grad(grid_.phases[f], grad_x + f * plan_.chunk, channel, channels, columns);
    if (grid_.idle_phases.empty()) return;
    std::fill_n(grad_x, channels * plan_.chunk * phases, S(0));  // inputs that the kernel strides over
    for (const Triple& phase : grid_.idle_phases) store_grad(phase, grad_x, channel, channels, columns);
  }

  void store_grad(const Triple& phase, const S* rows, int64_t channel, int64_t channels, Columns columns) const {
    const Placement place = place_input(call_.layer, call_.sizes, grid_, grads_.in.strides, phase);
    unpack<S, A>(call_.table, grid_, place, static_cast<A*>(grads_.in.data), channel, channels, columns, rows,
           plan_.chunk * static_cast<int64_t>(grid_.phases.size()));
  }

  const Call<S, A>& call_;
  TensorRef x_, grad_out_;
  const Gradients<S>& grads_;
  const S* values_;
  S *dots_, *bias_sums_;
  int64_t splits_, groups_;
  const Contraction::Lowered& low_;
  const Schedule& plan_;
  const Grid& grid_;
  Pieces pieces_;
  size_t panel_at_, x_at_, grad_x_at_;
};

template <class S, class A>
void run_backward(const Call<S, A>& call, TensorRef x, const S* values, TensorRef grad_out, const Gradients<S>& grads,
                  bool parallel) {
  const Stream& stream = call.low.stream;
  const int64_t nnz = stream.nnz(), threads = parallel ? omp_get_max_threads() : 1, rows = call.layer.out_channels;
  const int64_t splits = column_splits(call.low.schedule.chunks, nnz, sizeof(S));
  const int64_t groups = std::min<int64_t>(threads / std::gcd(splits, threads),
                                           std::max<size_t>(1, stream.parts().size()));
  Pieces pieces;
  const size_t values_at = pieces.add<S>(nnz), dots_at = pieces.add<S>(grads.values ? nnz * splits : 0),
               bias_at = pieces.add<S>(rows * splits);
  void* scratch = call_arena().reserve(pieces.bytes());
  if (scratch == nullptr) throw std::bad_alloc();
  S* values_t = at<S>(scratch, values_at);
  S* dots = at<S>(scratch, dots_at);
  S* bias_sums = grads.bias ? at<S>(scratch, bias_at) : nullptr;
  if (bias_sums) std::fill_n(bias_sums, rows * splits, S(0));
  const uint32_t* permutation = stream.permutation().data();
  const int64_t slices = parallel && nnz > (1 << 15) ? threads : 1;
  if (grads.in.data) {
    run_tasks(slices, true, 64, [&](int64_t i, void*) {
      const Range r = share(nnz, slices, i);
      call.kernels().gather(values_t + r.begin, values, permutation + r.begin, r.end - r.begin);
    });
  }
  const BackwardRun<S, A> run(call, x, grad_out, grads, values_t, dots, bias_sums, splits, groups);
  run_tasks(run.tasks(), parallel, run.scratch_bytes(), run);
  if (grads.values) {
    run_tasks(slices, true, 64, [&](int64_t i, void*) {
      const Range r = share(nnz, slices, i);
      for (int64_t k = r.begin; k < r.end; ++k) {
        S sum = dots[k];
        for (int64_t s = 1; s < splits; ++s) sum += dots[s * nnz + k];
        grads.values[permutation[k]] = sum;
      }
    });
  }
  for (int64_t o = 0; grads.bias && o < rows; ++o) {
    S sum = bias_sums[o];
    for (int64_t s = 1; s < splits; ++s) sum += bias_sums[s * rows + o];
    grads.bias[o] = sum;
  }
  call_arena().trim(kKeepScratch);
}

bool batch_last(const Strides& strides, int64_t batch) { return batch > 1 && strides[0] == 1; }

}  // namespace

Contraction::Contraction(const Layer& layer, const int64_t* row_ptr, const int32_t* col_idx, int64_t nnz)
    : layer_(layer), row_ptr_(row_ptr), col_idx_(col_idx), nnz_(nnz) {
  check_indices();
}

void Contraction::check_indices() const {
  auto fail = [](const std::string& what) { throw std::invalid_argument("Sparsity pattern refused: " + what); };
  if (nnz_ >= int64_t{0xffffffff}) fail("more than 2^32 - 1 non-zeros in one layer.");
  if (row_ptr_[0] != 0 || row_ptr_[layer_.out_channels] != nnz_) {
    fail("row_ptr must run from 0 to nnz = " + std::to_string(nnz_) + ".");
  }
  const int64_t columns = layer_.row_size();
  for (int64_t r = 0; r < layer_.out_channels; ++r) {
    const int64_t begin = row_ptr_[r], end = row_ptr_[r + 1];
    if (begin > end || end > nnz_) fail("row_ptr decreases at row " + std::to_string(r) + ".");
    for (int64_t k = begin; k < end; ++k) {
      if (col_idx_[k] < 0 || col_idx_[k] >= columns) {
        fail("column " + std::to_string(col_idx_[k]) + " in row " + std::to_string(r) + " is outside 0 .. " +
             std::to_string(columns - 1) + ".");
      }
      if (k > begin && col_idx_[k] <= col_idx_[k - 1]) fail("columns of row " + std::to_string(r) + " are not increasing.");
    }
  }
}

Entries Contraction::forward_entries(const Grid& grid) const {
  const std::vector<Tap> taps = make_taps(layer_, grid);
  const int64_t n_taps = layer_.taps(), phases = static_cast<int64_t>(grid.phases.size());
  const int64_t group_in = layer_.in_channels / layer_.groups, group_out = layer_.out_channels / layer_.groups;
  Entries e;
  e.rows = layer_.out_channels;
  e.panel_rows = layer_.in_channels * phases;
  e.row_start.assign(row_ptr_, row_ptr_ + e.rows + 1);
  e.panel_row.resize(nnz_);
  e.shift.resize(nnz_);
  for (int64_t r = 0; r < e.rows; ++r) {
    const int64_t first_channel = r / group_out * group_in;
    for (int64_t k = row_ptr_[r]; k < row_ptr_[r + 1]; ++k) {
      const Tap& tap = taps[col_idx_[k] % n_taps];
      e.panel_row[k] = static_cast<uint32_t>((first_channel + col_idx_[k] / n_taps) * phases + tap.phase);
      e.shift[k] = static_cast<uint32_t>(tap.shift);
    }
  }
  return e;
}

// The transposed pattern by a counting sort: rows are (input channel, phase), panel rows output channels. Grad_out
// lies max_shift columns into its panel, so that the shift against the output becomes one to the right.
Entries Contraction::backward_entries(const Grid& grid) const {
  const Entries f = forward_entries(grid);
  Entries e;
  e.rows = f.panel_rows;
  e.panel_rows = f.rows;
  e.row_start.assign(e.rows + 1, 0);
  for (const uint32_t row : f.panel_row) ++e.row_start[row + 1];
  std::partial_sum(e.row_start.begin(), e.row_start.end(), e.row_start.begin());
  std::vector<int64_t> next(e.row_start.begin(), e.row_start.end() - 1);
  e.panel_row.resize(nnz_);
  e.shift.resize(nnz_);
  e.value.resize(nnz_);
  for (int64_t r = 0; r < f.rows; ++r) {
    for (int64_t k = f.row_start[r]; k < f.row_start[r + 1]; ++k) {
      const int64_t to = next[f.panel_row[k]]++;
      e.panel_row[to] = static_cast<uint32_t>(r);
      e.shift[to] = static_cast<uint32_t>(grid.max_shift - f.shift[k]);
      e.value[to] = static_cast<uint32_t>(k);
    }
  }
  return e;
}

std::shared_ptr<const Contraction::Lowered> Contraction::lower(Direction direction, const Sizes& sizes,
                                                               int64_t element_size, int64_t lanes) {
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
  check_indices();  // the borrowed arrays may have changed since
  const Grid grid = make_grid(layer_, sizes, lanes);
  const int64_t phases = static_cast<int64_t>(grid.phases.size()), inner = layer_.in_channels * phases;
  const bool forward = direction == Direction::forward;
  const Problem problem = forward ? Problem{layer_.out_channels, inner, 1, phases, double(nnz_)}
                                  : Problem{inner, layer_.out_channels, phases, 1, double(nnz_)};
  const Schedule schedule = make_schedule(layer_, grid, problem, element_size);
  auto lowered = std::make_shared<const Lowered>(
      Lowered{direction, element_size, sizes, grid, schedule,
              Stream(forward ? forward_entries(grid) : backward_entries(grid), schedule.stream)});
  if (cache_.size() >= kCached) cache_.erase(cache_.begin());
  cache_.push_back(lowered);
  return lowered;
}

int64_t Contraction::storage_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = 0;
  for (const auto& l : cache_) bytes += l->stream.storage_bytes();
  return bytes;
}

void Contraction::forward(DType dtype, const Sizes& sizes, TensorRef x, const void* values, const void* bias,
                          TensorRef out) {
  const int64_t element = dtype == DType::float64 ? 8 : 4;
  const int64_t lanes = choose_lanes(sizes, element, batch_last(x.strides, sizes.batch));
  const auto low = lower(Direction::forward, sizes, element, lanes);
  const bool parallel = double(nnz_) * double(low->grid.columns) > kSerialWork;
  const Kernels& table = active_kernels();
  if (dtype == DType::float64) {
    run_forward<double, double>({layer_, sizes, *low, table}, x, static_cast<const double*>(values),
                                static_cast<const double*>(bias), out, parallel);
  } else if (dtype == DType::float32) {
    run_forward<float, float>({layer_, sizes, *low, table}, x, static_cast<const float*>(values),
                              static_cast<const float*>(bias), out, parallel);
  } else {
    run_forward<float, bf16>({layer_, sizes, *low, table}, x, static_cast<const float*>(values),
                             static_cast<const float*>(bias), out, parallel);
  }
}

void Contraction::backward(DType dtype, const Sizes& sizes, TensorRef x, const void* values, TensorRef grad_out,
                           TensorRef grad_in, void* grad_values, void* grad_bias) {
  const int64_t element = dtype == DType::float64 ? 8 : 4;
  const int64_t lanes = choose_lanes(sizes, element, batch_last(grad_out.strides, sizes.batch));
  const auto low = lower(Direction::backward, sizes, element, lanes);
  const bool parallel = double(nnz_) * double(low->grid.columns) > kSerialWork;
  const Kernels& table = active_kernels();
  if (dtype == DType::float64) {
    const Gradients<double> grads{grad_in, static_cast<double*>(grad_values), static_cast<double*>(grad_bias)};
    run_backward<double, double>({layer_, sizes, *low, table}, x, static_cast<const double*>(values), grad_out, grads, parallel);
    return;
  }
  const Gradients<float> grads{grad_in, static_cast<float*>(grad_values), static_cast<float*>(grad_bias)};
  if (dtype == DType::float32) {
    run_backward<float, float>({layer_, sizes, *low, table}, x, static_cast<const float*>(values), grad_out, grads, parallel);
  } else {
    run_backward<float, bf16>({layer_, sizes, *low, table}, x, static_cast<const float*>(values), grad_out, grads, parallel);
  }
}

}  // namespace sparseprop
