// What running a contraction needs: one call's tensors and lowered form, scratch memory, tasks over threads.
#pragma once
#include <algorithm>
#include <new>

#include "arena.h"
#include "contraction.h"
#include "schedule.h"
#include "team.h"

namespace sparseprop {

constexpr double kMoveWork = 16;  // packing or storing one activation element costs about as many multiply-adds

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr size_t kKeepScratch = size_t{64} << 20;  // bytes of a call's scratch that outlive it

// Scratch of one task, and of one call around its tasks.
inline Arena& thread_arena() {
  thread_local Arena arena;
  return arena;
}

inline Arena& call_arena() {
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

inline void* reserve(Arena& arena, size_t bytes) {
  void* scratch = arena.reserve(bytes);
  if (scratch == nullptr) throw std::bad_alloc();
  return scratch;
}

// This thread's scratch, until it asks for more.
inline void* scratch_of(size_t bytes) { return reserve(thread_arena(), bytes); }

// A call's scratch; large ones are given back behind it.
struct CallScratch {
  void* data;
  explicit CallScratch(size_t bytes) : data(reserve(call_arena(), bytes)) {}
  CallScratch(const CallScratch&) = delete;
  CallScratch& operator=(const CallScratch&) = delete;
  ~CallScratch() { call_arena().trim(kKeepScratch); }
};

// A tile among all, its first column in its chunk, and its size.
struct TileAt {
  int64_t index, column, vectors;
};

template <class S, class A>
struct Call {
  const Layer& layer;
  const Sizes& sizes;
  const Lowered& low;
  const Kernels& table;

  const KernelsOf<S>& kernels() const { return kernels_of<S>(table); }
  Columns chunk(int64_t c) const {
    const int64_t begin = c * low.schedule.chunk;
    return {begin, std::min(begin + low.schedule.chunk, low.grid.columns)};
  }
  // Parts of the rows whose work outweighs packing their chunk once more.
  int64_t worthwhile_parts() const {
    const double packing = kMoveWork * double(low.schedule.panel_size) / double(low.schedule.chunk);
    const double part = double(low.stream.nnz()) / double(low.stream.parts().size());
    return 1 + static_cast<int64_t>(std::min(packing / std::max(part, 1.0), 1e6));
  }
  // Columns of the padded grid that a chunk's panel is for.
  Columns panel_columns(int64_t c) const {
    if (!low.schedule.compact.used()) return padded(chunk(c));
    const Range range = low.schedule.compact.padded(c);
    return {range.begin, range.end};
  }
  TileAt tile(Columns chunk, int64_t j) const {
    const int64_t columns = std::min(low.schedule.tile, chunk.end - chunk.begin - j);
    return {(chunk.begin + j) / low.schedule.tile, j, ceil_div(columns, lanes<S>())};
  }
  // A block as the kernels read it: the copies, made in `slab`, of its channels' columns if there are any, else the panel itself.
  const S* block(int64_t b, const S* panel, const TileAt& tile, S* slab) const {
    const Schedule& plan = low.schedule;
    const bool forward = low.direction == Direction::forward;
    const int64_t channels = forward ? layer.in_channels : layer.out_channels;
    const int64_t rows = forward ? static_cast<int64_t>(low.padded.phases.size()) : 1;  // of a channel
    const int64_t pitch = plan.panel.row_pitch, first = low.stream.panel_row(b);
    if (plan.shifted.pitch == 0) return panel + plan.panel.at(tile.column) + first * pitch;
    const int64_t count = std::min(low.stream.panel_row(b + 1), channels) - first;
    for (const Shifted::Copy& copy : plan.shifted.copies) {
      const S* from = panel + (first * rows + copy.phase) * pitch + copy.from;
      const ColumnRun whole = {0, static_cast<int32_t>(tile.column), static_cast<int32_t>(tile.vectors * lanes<S>() + copy.beyond)};
      const bool compact = plan.compact.used();
      kernels().copy_runs({slab + copy.to, plan.shifted.pitch, from, pitch * rows, count,
                           compact ? plan.compact.runs(tile.index) : &whole, compact ? plan.compact.n_runs(tile.index) : 1});
    }
    return slab;
  }
  int64_t slab_size() const { return low.schedule.stream.block_rows * low.schedule.shifted.pitch; }
  // Padded to whole vectors, so that kernels never see what an earlier call left.
  static Columns padded(Columns columns) {
    return {columns.begin, columns.begin + ceil_div(columns.end - columns.begin, lanes<S>()) * lanes<S>()};
  }
};

// Runs the pieces of a contraction; a thread keeps the panel of the chunk that it packed last.
template <class Run>
void run_chunks(const Run& run, const std::vector<Rectangle>& work, const Sharing& rule, bool parallel) {
  run_team(work, rule, parallel, [&] {
    return [&run, scratch = scratch_of(run.scratch_bytes()), packed = int64_t{-1}](Piece piece) mutable {
      if (piece.chunk != packed) run.pack_chunk(packed = piece.chunk, scratch);
      run(piece, scratch);
    };
  });
}

// `added` to the input gradient, or null: what reaches the input on other ways.
template <class S>
struct Gradients {
  TensorRef in, added;
  S* values;
  S* bias;
};

// Element type A of the activations, S of values, bias and sums.
template <class S, class A>
void run_forward(const Call<S, A>& call, TensorRef x, const S* values, const S* bias, TensorRef out, const Finish* finish,
                 bool parallel);
template <class S, class A>
void run_backward(const Call<S, A>& call, TensorRef x, const S* values, TensorRef grad_out, const Gradients<S>& grads,
                  bool parallel);

// The same on a layer lowered by rows.
template <class S, class A>
void run_backward_rows(const Call<S, A>& call, TensorRef x, const S* values, TensorRef grad_out, const Gradients<S>& grads,
                       bool parallel);

}  // namespace sparseprop
