// Forward: pack a chunk of the input, run every part of the rows over its tiles, store the output tiles.
// Tried: 1x1 layers on planes of 28x28 and 56x56 as they lie, neither packed nor stored, a block of channels at a time so that
// memory is read in order: at 2 % density 20 to 45 % faster where inputs are most of it, 10 % slower where outputs are; 0 to 10 %
// faster at 50 %, 0 to 10 % slower at 5 to 20.
#include <optional>

#include "run.h"

namespace sparseprop {
namespace {

constexpr int64_t kColdChunks = 4;  // walked more often than this in one call, values stay in the cache

// Batch norm, residual and activation on tiles that are still in the cache.
template <class S>
class Finisher {
 public:
  explicit Finisher(const Finish& finish) : finish_(finish) {}

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
    norm.scale = static_cast<const S*>(finish_.scale) + part.row;
    norm.shift = static_cast<const S*>(finish_.shift) + part.row;
    norm.other = finish_.residual.data ? residual : nullptr;
    norm.x = norm.out = tile;
    call.kernels().planes.apply(norm);
  }

 private:
  const Finish& finish_;
};

// One call's pieces: a part of the rows on a chunk of the columns.
template <class S, class A>
class ForwardRun {
 public:
  ForwardRun(const Call<S, A>& call, TensorRef x, const S* values, const S* bias, TensorRef out, const Finish* finish)
      : call_(call), x_(x), out_(out), values_(values), bias_(bias) {
    panel_at_ = pieces_.add<S>(plan_.panel_size);
    slab_at_ = pieces_.add<S>(call.slab_size());
    tile_at_ = pieces_.add<S>(stream_.max_part_rows() * plan_.chunk);
    residual_at_ = pieces_.add<S>(finish && finish->residual.data ? stream_.max_part_rows() * plan_.chunk : 0);
    if (finish) finisher_.emplace(*finish);
  }

  size_t scratch_bytes() const { return pieces_.bytes(); }

  void pack_chunk(int64_t chunk, void* scratch) const {
    const Columns columns = call_.panel_columns(chunk);
    const Grid& grid = call_.low.padded;
    const int64_t phases = static_cast<int64_t>(grid.phases.size());
    S* panel = at<S>(scratch, panel_at_);
    PanelShape shape = plan_.panel;
    shape.row_pitch *= phases;
    for (int64_t f = 0; f < phases; ++f) {
      const Placement place = place_input(call_.layer, call_.sizes, grid, x_.strides, grid.phases[f]);
      pack<A, S>(call_.table, grid, place, static_cast<const A*>(x_.data), 0, call_.layer.in_channels,
           {columns.begin, columns.end + grid.max_shift}, panel + f * plan_.panel.row_pitch, shape);
    }
  }

  void operator()(Piece piece, void* scratch) const {
    const Columns columns = call_.chunk(piece.chunk);
    const int64_t width = columns.end - columns.begin;
    const S* panel = at<S>(scratch, panel_at_);
    S* tile = at<S>(scratch, tile_at_);
    const Stream::Part part = stream_.parts()[piece.part];
    const bool cold = plan_.shifted.pitch > 0 || plan_.chunks <= kColdChunks;  // few channels a block: a row's values lie far apart
    for (int64_t j = 0; j < width; j += plan_.tile) {
      const TileAt here = call_.tile(columns, j);
      for (int64_t b = 0; b < stream_.blocks(); ++b) {
        const BlockStream stream = stream_.block(piece.part, b);
        if (stream.n_runs == 0) continue;
        const S* block = call_.block(b, panel, here, at<S>(scratch, slab_at_));
        call_.kernels().forward[here.vectors - 1]({stream, values_, bias_ ? bias_ + part.row : nullptr, block,
                                                   plan_.stream.unit_log2, tile + j, plan_.chunk, cold, false});
      }
    }
    if constexpr (std::is_same_v<S, A>) {
      if (finisher_) (*finisher_)(call_, part, columns, tile, at<S>(scratch, residual_at_));
    }
    unpack<S, A>(call_.table, grid_, place_output(call_.sizes, grid_, out_.strides), static_cast<A*>(out_.data), part.row,
           part.rows, columns, tile, plan_.chunk);
  }

 private:
  const Call<S, A>& call_;
  const TensorRef x_, out_;
  const S *values_, *bias_;
  const Schedule& plan_ = call_.low.schedule;
  const Grid& grid_ = call_.low.grid;
  const Stream& stream_ = call_.low.stream;
  std::optional<Finisher<S>> finisher_;
  Pieces pieces_;
  size_t panel_at_, slab_at_, tile_at_, residual_at_;
};

}  // namespace

template <class S, class A>
void run_forward(const Call<S, A>& call, TensorRef x, const S* values, const S* bias, TensorRef out, const Finish* finish,
                 bool parallel) {
  const int64_t chunks = call.low.schedule.chunks,
                parts = static_cast<int64_t>(call.low.stream.parts().size()), threads = team_size(parallel);
  const ForwardRun<S, A> run(call, x, values, bias, out, finish);
  run_chunks(run, cut(chunks, std::min(chunks, threads), parts, threads), {false, call.worthwhile_parts()}, parallel);
}

template void run_forward(const Call<float, float>&, TensorRef, const float*, const float*, TensorRef, const Finish*, bool);
template void run_forward(const Call<double, double>&, TensorRef, const double*, const double*, TensorRef,
                          const Finish*, bool);
template void run_forward(const Call<float, bf16>&, TensorRef, const float*, const float*, TensorRef, const Finish*, bool);

}  // namespace sparseprop
