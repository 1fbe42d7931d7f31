// What running a contraction needs: one call's tensors and lowered form, scratch memory, tasks over threads.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "arena.h"
#include "contraction.h"
#include "schedule.h"

namespace sparseprop {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

inline Range share(int64_t total, int64_t pieces, int64_t i) { return {total * i / pieces, total * (i + 1) / pieces}; }

template <class S, class A>
struct Call {
  const Layer& layer;
  const Sizes& sizes;
  const Lowered& low;
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

template <class S>
struct Gradients {
  TensorRef in;
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

}  // namespace sparseprop
