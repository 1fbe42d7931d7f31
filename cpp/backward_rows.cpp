// Backward for few columns: the pattern by output rows, values and weight gradients where the optimizer has them.
#include "run.h"

namespace sparseprop {
namespace {

template <class S, class A>
class BackwardRowsRun {
 public:
  BackwardRowsRun(const Call<S, A>& call, TensorRef x, const S* values, TensorRef grad_out, const Gradients<S>& grads, S* panel)
      : call_(call), x_(x), grad_out_(grad_out), grads_(grads), values_(values), panel_(panel) {
    const int64_t block = std::min(stream_.panel_row(1), call.layer.in_channels) * plan_.tile;
    x_at_ = pieces_.add<S>(block);
    grad_x_at_ = pieces_.add<S>(block);
  }

  size_t scratch_bytes() const { return pieces_.bytes(); }

  // A share of grad_out's rows, and their sums.
  void pack_rows(Range rows) const {
    const Placement place = place_output(call_.sizes, grid_, grad_out_.strides);
    S* panel = panel_ + rows.begin * plan_.tile;
    pack<A, S>(call_.table, grid_, place, static_cast<const A*>(grad_out_.data), rows.begin, rows.size(), padded_, panel,
               plan_.panel);
    if (!grads_.bias) return;
    std::fill(grads_.bias + rows.begin, grads_.bias + rows.end, S(0));
    call_.kernels().row_sums(grads_.bias + rows.begin, panel, plan_.tile, rows.size(), padded_.end);
  }

  // All rows' non-zeros in one block of the input channels.
  void run_block(int64_t b, void* scratch) const {
    const int64_t channel = stream_.panel_row(b);
    const int64_t channels = std::min(stream_.panel_row(b + 1), call_.layer.in_channels) - channel;
    S* x = at<S>(scratch, x_at_);
    S* grad_x = grads_.in.data ? at<S>(scratch, grad_x_at_) : nullptr;
    if (grads_.values) load(x_, channel, channels, x);
    if (grad_x && grads_.added.data) {
      load(grads_.added, channel, channels, grad_x);
    } else if (grad_x) {
      std::fill_n(grad_x, channels * plan_.tile, S(0));
    }
    call_.kernels().backward_rows[ceil_div(grid_.columns, lanes<S>()) - 1](
        {stream_.block(0, b), values_, panel_, x, grad_x, plan_.stream.unit_log2, plan_.tile, grads_.values});
    if (grad_x) {
      unpack<S, A>(call_.table, grid_, place(grads_.in), static_cast<A*>(grads_.in.data), channel, channels, columns_, grad_x,
                   plan_.tile);
    }
  }

 private:
  Placement place(const TensorRef& tensor) const {
    return place_input(call_.layer, call_.sizes, grid_, tensor.strides, grid_.phases[0]);
  }
  void load(const TensorRef& tensor, int64_t channel, int64_t channels, S* rows) const {
    pack<A, S>(call_.table, grid_, place(tensor), static_cast<const A*>(tensor.data), channel, channels, padded_, rows, plan_.panel);
  }

  const Call<S, A>& call_;
  TensorRef x_, grad_out_;
  const Gradients<S>& grads_;
  const S* values_;
  S* panel_;
  const Schedule& plan_ = call_.low.schedule;
  const Grid& grid_ = call_.low.grid;
  const Stream& stream_ = call_.low.stream;
  const Columns columns_ = call_.chunk(0), padded_ = call_.padded(columns_);
  Pieces pieces_;
  size_t x_at_, grad_x_at_;
};

}  // namespace

template <class S, class A>
void run_backward_rows(const Call<S, A>& call, TensorRef x, const S* values, TensorRef grad_out, const Gradients<S>& grads,
                       bool parallel) {
  const int64_t rows = call.layer.out_channels, shares = team_size(parallel && rows * call.low.schedule.tile >= kSerial);
  Pieces pieces;
  const size_t panel_at = pieces.add<S>(rows * call.low.schedule.tile);
  const CallScratch scratch(pieces.bytes());
  const BackwardRowsRun<S, A> run(call, x, values, grad_out, grads, at<S>(scratch.data, panel_at));
  run_each(shares, shares > 1, [&](int64_t i) { run.pack_rows(share(rows, shares, i)); });
  if (grads.in.data || grads.values) {
    run_list(call.low.stream.blocks(), parallel, [&] {
      return [&run, mine = scratch_of(run.scratch_bytes())](int64_t b) { run.run_block(b, mine); };
    });
  }
}

template void run_backward_rows(const Call<float, float>&, TensorRef, const float*, TensorRef, const Gradients<float>&, bool);
template void run_backward_rows(const Call<double, double>&, TensorRef, const double*, TensorRef, const Gradients<double>&, bool);
template void run_backward_rows(const Call<float, bf16>&, TensorRef, const float*, TensorRef, const Gradients<float>&, bool);

}  // namespace sparseprop
