// Work shared out over torch's threads. Pieces are claimed one by one, and a thread that has run out takes over half of
// what another has not begun: cores are seldom equally fast (neighbours, clocks, interrupts), and shares fixed in advance
// end with the slowest.
#pragma once
#include <omp.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <utility>
#include <vector>

#include "range.h"

namespace sparseprop {

constexpr int64_t kSerial = 1 << 15;  // elements, or non-zeros, below which starting threads costs more than it saves

// Chunks times parts. A chunk has a cost of its own for each thread that works on it (packing its panel).
struct Rectangle {
  Range chunks, parts;
};

struct Piece {
  int64_t chunk, part;
};

// `shares` ranges of the chunks, each with all parts, or with some where there are more threads than that.
std::vector<Rectangle> cut(int64_t chunks, int64_t shares, int64_t parts, int64_t threads);

struct Sharing {
  bool in_order;        // a part's chunks are done one after the other, as their sums go to the same place
  int64_t least_parts;  // of a chunk that another thread has begun: fewer are not worth its cost
};

// What one thread has before it, chunk by chunk.
class alignas(64) Job {
 public:
  void set(const Rectangle& work, bool begun);
  // The next piece. With it the one before counts as done.
  bool claim(Piece& piece);
  // Pieces that another thread may be given, now or later.
  int64_t spare(const Sharing& rule) const;
  // Gives away about half of what is not claimed, all of it if nothing is; false if that must wait.
  bool give(const Sharing& rule, Rectangle& half);

 private:
  int64_t chunks_behind() const { return chunks_.end - chunks_.begin - 1; }
  int64_t middle() const;

  mutable std::mutex mutex_;
  Range chunks_ = {0, 0}, parts_ = {0, 0};  // from the chunk at hand on
  int64_t part_ = 0;                        // next one of the chunk at hand
  bool begun_ = true;
};

class Team {
 public:
  Team(const std::vector<Rectangle>& work, const Sharing& rule, int threads);
  bool next(int thread, Piece& piece);
  // No piece is handed out any more. The first error counts.
  void fail(std::exception_ptr error) {
    if (!failed_.exchange(true)) error_ = std::move(error);
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }
  bool failed() const { return failed_.load(); }

 private:
  Job* with_most_to_spare();

  std::vector<Job> jobs_;
  Sharing rule_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// `start` is called once on each thread that calls kernels, before they ask how many threads there are: torch tells OpenMP of
// torch.set_num_threads on the threads that it ran on, not on those that came later.
void on_each_thread(void (*start)());
int most_threads();
inline int team_size(bool parallel) { return parallel && !omp_in_parallel() ? most_threads() : 1; }

// start() is called by every thread and returns what does its pieces: member(piece).
template <class Start>
void run_team(const std::vector<Rectangle>& work, const Sharing& rule, bool parallel, Start start) {
  const int threads = team_size(parallel);
  if (threads == 1) {
    auto member = start();
    for (const Rectangle& w : work)
      for (int64_t chunk = w.chunks.begin; chunk < w.chunks.end; ++chunk)
        for (int64_t part = w.parts.begin; part < w.parts.end; ++part) member(Piece{chunk, part});
    return;
  }
  Team team(work, rule, threads);
#pragma omp parallel num_threads(threads)
  try {
    auto member = start();
    for (Piece piece; team.next(omp_get_thread_num(), piece);) member(piece);
  } catch (...) {
    team.fail(std::current_exception());
  }
  team.rethrow();
}

// Runs start()(i) for i < tasks, independent of each other.
template <class Start>
void run_list(int64_t tasks, bool parallel, Start start) {
  const int threads = team_size(parallel);
  run_team(cut(tasks, threads, 1, threads), {false, 1}, parallel, [&] {
    return [task = start()](Piece piece) mutable { task(piece.chunk); };
  });
}

// The same for a task that keeps nothing of its own from one i to the next.
template <class Task>
void run_each(int64_t tasks, bool parallel, Task task) {
  run_list(tasks, parallel, [&] { return [&](int64_t i) { task(i); }; });
}

}  // namespace sparseprop
