// Forward: pack a chunk of the input, run every part of the rows over its tiles, store the output tiles.
#include <cmath>

#include "norm.h"
#include "run.h"

namespace sparseprop {
namespace {

constexpr int64_t kColdChunks = 4;  // walked more often than this in one call, values stay in the cache

// Row groups per chunk so that every thread gets nearly the same number of (chunk, group) tasks.
int64_t row_groups(int64_t chunks, int64_t parts) {
  const int64_t threads = omp_get_max_threads();
  for (int64_t g = 1; g < parts; ++g) {
    const int64_t tasks = chunks * g;
    if (10 * ceil_div(tasks, threads) * threads <= 11 * tasks) return g;
  }
  return std::max<int64_t>(1, parts);
}

// Batch norm, residual and activation on tiles that are still in the cache.
template <class S>
class Finisher {
 public:
  Finisher(const Finish& finish, int64_t channels) : finish_(finish), scale_(channels), shift_(channels) {
    const auto *mean = static_cast<const S*>(finish.mean), *variance = static_cast<const S*>(finish.variance),
               *gamma = static_cast<const S*>(finish.gamma), *beta = static_cast<const S*>(finish.beta);
    for (int64_t c = 0; c < channels; ++c) {
      const Affine<S> of(gamma, beta, c, mean[c], 1.0 / std::sqrt(variance[c] + finish.eps));
      scale_[c] = of.scale;
      shift_[c] = of.shift;
    }
  }

  // `residual` is scratch of the tile's size.
  void operator()(const Call<S, S>& call, Stream::Part part, Columns columns, S* tile, S* residual) const {
    const int64_t pitch = call.low.schedule.chunk;
    if (finish_.residual.data) {
      const Placement place = place_output(call.sizes, call.low.grid, finish_.residual.strides);
      pack<S, S>(call.table, call.low.grid, place, static_cast<const S*>(finish_.residual.data), part.row, part.rows, columns,
                 residual, {pitch, pitch, pitch});
    }
    NormArgs<S> norm{};
    norm.rows = 1;
    norm.channels = part.rows;
    norm.n = pitch;
    norm.cap = static_cast<S>(finish_.cap);
    norm.scale = scale_.data() + part.row;
    norm.shift = shift_.data() + part.row;
    norm.other = finish_.residual.data ? residual : nullptr;
    norm.x = norm.out = tile;
    call.kernels().planes.apply(norm);
  }

 private:
  const Finish& finish_;
  std::vector<S> scale_, shift_;
};

}  // namespace

template <class S, class A>
void run_forward(const Call<S, A>& call, TensorRef x, const S* values, const S* bias, TensorRef out, const Finish* finish,
                 bool parallel) {
  const Lowered& low = call.low;
  const Grid& grid = low.grid;
  const Schedule& plan = low.schedule;
  const Stream& stream = low.stream;
  const int64_t parts = static_cast<int64_t>(stream.parts().size()), phases = static_cast<int64_t>(grid.phases.size());
  const int64_t groups = parallel ? row_groups(plan.chunks, parts) : 1;
  const Placement place_out = place_output(call.sizes, grid, out.strides);

  Pieces pieces;
  const size_t panel_at = pieces.add<S>(plan.panel_size), tile_at = pieces.add<S>(stream.max_part_rows() * plan.chunk),
               residual_at = pieces.add<S>(finish && finish->residual.data ? stream.max_part_rows() * plan.chunk : 0);
  std::optional<Finisher<S>> finisher;
  if (finish) finisher.emplace(*finish, call.layer.out_channels);
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
                                        plan.stream.unit_log2, tile + j, plan.chunk, plan.chunks <= kColdChunks});
        }
      }
      if constexpr (std::is_same_v<S, A>) {
        if (finisher) (*finisher)(call, part, columns, tile, at<S>(scratch, residual_at));
      }
      unpack<S, A>(call.table, grid, place_out, static_cast<A*>(out.data), part.row, part.rows, columns, tile,
             plan.chunk);
    }
  });
}

template void run_forward(const Call<float, float>&, TensorRef, const float*, const float*, TensorRef, const Finish*, bool);
template void run_forward(const Call<double, double>&, TensorRef, const double*, const double*, TensorRef,
                          const Finish*, bool);
template void run_forward(const Call<float, bf16>&, TensorRef, const float*, const float*, TensorRef, const Finish*, bool);

}  // namespace sparseprop
