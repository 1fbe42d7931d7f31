// Backward: pack a chunk of grad_out, then walk the transposed pattern: input gradient and weight gradient together.
#include "interleave.h"
#include "run.h"

namespace sparseprop {
namespace {

// Columns are cut into `splits` ranges with a partial weight gradient each: a number that depends on the problem
// alone, so that results do not depend on the thread count. More of them share out the packing of `moved` elements among
// more threads, and cost a sum over all non-zeros: 512->512 3x3 @7, batch 16, 50 % density, one thread, 4 37.0 ms, 2 31.0.
int64_t column_splits(int64_t chunks, int64_t moved, int64_t nnz, size_t element) {
  const int64_t splits = chunks >= 8 && 2 * nnz < moved ? 4 : chunks >= 2 ? 2 : 1;
  return static_cast<size_t>(nnz) * element * splits <= (size_t{256} << 20) ? splits : 1;
}

template <class S, class A>
class BackwardRun {
 public:
  BackwardRun(const Call<S, A>& call, TensorRef x, TensorRef grad_out, const Gradients<S>& grads, S* values_t, S* dots,
              S* bias_sums, int64_t splits)
      : call_(call), x_(x), grad_out_(grad_out), grads_(grads), values_(values_t), dots_(dots), bias_sums_(bias_sums),
        splits_(splits) {
    panel_at_ = pieces_.add<S>(plan_.panel_size);
    slab_at_ = pieces_.add<S>(call.slab_size());
    const int64_t tile = low_.stream.max_part_rows() * plan_.chunk;
    x_at_ = pieces_.add<S>(grads.values ? tile : 0);
    grad_x_at_ = pieces_.add<S>(grads.in.data ? tile : 0);
  }

  size_t scratch_bytes() const { return pieces_.bytes(); }

  // A split's chunks in one job, as their weight gradients are summed up.
  std::vector<Rectangle> work(int64_t threads) const {
    const bool bias_alone = !grads_.in.data && !grads_.values;
    const int64_t parts = bias_alone ? 1 : static_cast<int64_t>(low_.stream.parts().size());
    return cut(plan_.chunks, splits_, parts, threads);
  }

  void pack_chunk(int64_t chunk, void* scratch) const {
    const Columns columns = call_.panel_columns(chunk);
    const Grid& grid = low_.padded;
    const Placement place = place_output(call_.sizes, grid, grad_out_.strides);
    pack<A, S>(call_.table, grid, place, static_cast<const A*>(grad_out_.data), 0, call_.layer.out_channels,
         {columns.begin - grid.max_shift, columns.end}, at<S>(scratch, panel_at_), plan_.panel);
  }

  void operator()(Piece piece, void* scratch) const {
    int64_t split = 0;
    while (piece.chunk >= share(plan_.chunks, splits_, split).end) ++split;
    const Columns columns = call_.chunk(piece.chunk), padded = call_.padded(columns);
    const S* panel = at<S>(scratch, panel_at_);
    if (bias_sums_ && piece.part == 0) {
      const Columns sums = call_.panel_columns(piece.chunk);
      sum_bias(panel, sums.end - sums.begin, split);
    }
    if (!grads_.in.data && !grads_.values) return;
    const bool fresh = piece.chunk == share(plan_.chunks, splits_, split).begin;
    one_part(piece.part, columns, padded, panel, scratch, split, fresh);
  }

 private:
  void sum_bias(const S* panel, int64_t width, int64_t split) const {
    const int64_t rows = call_.layer.out_channels, step = plan_.panel.tile == plan_.panel.tile_pitch ? width : plan_.tile;
    for (int64_t j = 0; j < width; j += step) {
      call_.kernels().row_sums(bias_sums_ + split * rows, panel + plan_.panel.at(j) + low_.padded.max_shift,
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
    const PanelShape rows = {pitch(), plan_.tile, plan_.tile};
    for (int64_t f = 0; x && f < phases; ++f) {
      const Placement place = low_.place_rows(call_.layer, x_.strides, grid_.phases[f]);
      pack<A, S>(call_.table, grid_, place, static_cast<const A*>(x_.data), channel, channels, padded,
           x + f * plan_.chunk, rows);
    }
    const Rows all = {channel, channels, columns};
    const bool onto = grad_x && grads_.added.data;
    for (int64_t f = 0; onto && f < phases; ++f) load_added(grid_.phases[f], grad_x + f * plan_.chunk, all);
    for (int64_t j = 0; j < width; j += plan_.tile) {
      const TileAt here = call_.tile(columns, j);
      for (int64_t b = 0; b < stream.blocks(); ++b) {
        const BlockStream block = stream.block(p, b);
        if (block.n_runs == 0) continue;
        const S* slab = call_.block(b, panel, here, at<S>(scratch, slab_at_));
        const unsigned unit_log2 = plan_.stream.unit_log2;
        if (x == nullptr) {
          call_.kernels().forward[here.vectors - 1](
              {block, values_, nullptr, slab, unit_log2, grad_x + j, plan_.chunk, false, onto});
          continue;
        }
        call_.kernels().backward[here.vectors - 1](
            {block, values_, slab, unit_log2, x + j, grad_x ? grad_x + j : nullptr, plan_.chunk,
             dots_ + split * stream.nnz() + stream.nonzeros(p, b).begin, !fresh || j > 0, onto});
      }
    }
    if (grad_x) store_grads(grad_x, all, onto);
  }

  struct Rows {
    int64_t channel, channels;
    Columns columns;
  };

  int64_t pitch() const { return plan_.chunk * static_cast<int64_t>(grid_.phases.size()); }

  // What the input gradient is added to.
  void load_added(const Triple& phase, S* rows, const Rows& all) const {
    const Placement place = low_.place_rows(call_.layer, grads_.added.strides, phase);
    pack<A, S>(call_.table, grid_, place, static_cast<const A*>(grads_.added.data), all.channel, all.channels,
               call_.padded(all.columns), rows, {pitch(), plan_.tile, plan_.tile});
  }

  void store_grads(S* rows, const Rows& all, bool onto) const {
    const bool idle = !grid_.idle_phases.empty();  // inputs that the kernel strides over
    if (takes_phases(call_.layer, grid_, grads_.in.strides) && !(idle && onto)) {
      return unpack_phases<S, A>(call_.table, call_.layer, call_.sizes, grid_, static_cast<A*>(grads_.in.data), grads_.in.strides,
                                 all.columns, {rows, plan_.chunk, pitch(), all.channel, all.channels});
    }
    for (size_t f = 0; f < grid_.phases.size(); ++f) store_grad(grid_.phases[f], rows + f * plan_.chunk, all);
    for (const Triple& phase : grid_.idle_phases) {
      for (int64_t c = 0; c < all.channels && !onto; ++c) std::fill_n(rows + c * pitch(), plan_.chunk, S(0));
      if (onto) load_added(phase, rows, all);
      store_grad(phase, rows, all);
    }
  }

  void store_grad(const Triple& phase, const S* rows, const Rows& all) const {
    const Placement place = low_.place_rows(call_.layer, grads_.in.strides, phase);
    unpack<S, A>(call_.table, grid_, place, static_cast<A*>(grads_.in.data), all.channel, all.channels, all.columns, rows,
                 pitch());
  }

  const Call<S, A>& call_;
  TensorRef x_, grad_out_;
  const Gradients<S>& grads_;
  const S* values_;
  S *dots_, *bias_sums_;
  int64_t splits_;
  const Lowered& low_ = call_.low;
  const Schedule& plan_ = low_.schedule;
  const Grid& grid_ = low_.grid;
  Pieces pieces_;
  size_t panel_at_, slab_at_, x_at_, grad_x_at_;
};

}  // namespace

template <class S, class A>
void run_backward(const Call<S, A>& call, TensorRef x, const S* values, TensorRef grad_out, const Gradients<S>& grads,
                  bool parallel) {
  const int64_t nnz = call.low.stream.nnz(), rows = call.layer.out_channels;
  const int64_t splits = column_splits(call.low.schedule.chunks, rows * call.low.grid.columns, nnz, sizeof(S));
  Pieces pieces;
  const size_t values_at = pieces.add<S>(nnz), dots_at = pieces.add<S>(grads.values ? nnz * splits : 0),
               bias_at = pieces.add<S>(rows * splits);
  const CallScratch scratch(pieces.bytes());
  S* values_t = at<S>(scratch.data, values_at);
  S* dots = at<S>(scratch.data, dots_at);
  S* bias_sums = grads.bias ? at<S>(scratch.data, bias_at) : nullptr;
  if (bias_sums) std::fill_n(bias_sums, rows * splits, S(0));
  if (grads.in.data) call.low.exchange.gather(call.table, values_t, values, parallel);
  const BackwardRun<S, A> run(call, x, grad_out, grads, values_t, dots, bias_sums, splits);
  run_chunks(run, run.work(team_size(parallel)), {true, call.worthwhile_parts()}, parallel);
  if (grads.values) call.low.exchange.scatter(call.table, grads.values, dots, splits, parallel);
  for (int64_t o = 0; grads.bias && o < rows; ++o) {
    S sum = bias_sums[o];
    for (int64_t s = 1; s < splits; ++s) sum += bias_sums[s * rows + o];
    grads.bias[o] = sum;
  }
}

template void run_backward(const Call<float, float>&, TensorRef, const float*, TensorRef, const Gradients<float>&, bool);
template void run_backward(const Call<double, double>&, TensorRef, const double*, TensorRef, const Gradients<double>&, bool);
template void run_backward(const Call<float, bf16>&, TensorRef, const float*, TensorRef, const Gradients<float>&, bool);

}  // namespace sparseprop
