#include "team.h"

#include <algorithm>
#include <thread>

namespace sparseprop {

std::vector<Rectangle> cut(int64_t chunks, int64_t shares, int64_t parts, int64_t threads) {
  std::vector<Rectangle> work;
  const int64_t groups = std::clamp<int64_t>(threads / std::max<int64_t>(1, shares), 1, std::max<int64_t>(1, parts));
  for (int64_t i = 0; i < shares; ++i)
    for (int64_t g = 0; g < groups; ++g) work.push_back({share(chunks, shares, i), share(parts, groups, g)});
  return work;
}

using Lock = std::lock_guard<std::mutex>;

void Job::set(const Rectangle& work, bool begun) {
  const Lock lock(mutex_);
  const bool empty = work.chunks.size() <= 0 || work.parts.size() <= 0;
  chunks_ = empty ? Range{0, 0} : work.chunks;
  parts_ = work.parts;
  part_ = parts_.begin;
  begun_ = begun || empty;
}

// The chunk at hand changes with the first claim of the next one, not with the last claim of its own: until then that
// one's last piece is being worked on.
bool Job::claim(Piece& piece) {
  const Lock lock(mutex_);
  if (part_ == parts_.end && chunks_.size() > 0) {
    ++chunks_.begin;
    part_ = parts_.begin;
  }
  if (chunks_.size() <= 0) return false;
  begun_ = true;
  piece = {chunks_.begin, part_++};
  return true;
}

// First part to give away, so that both have as much left; never the one that keeps the rest of the chunks going.
int64_t Job::middle() const {
  const int64_t chunks = chunks_behind() + 1;
  const int64_t even = (parts_.end + (part_ + chunks_behind() * parts_.begin) / chunks) / 2;
  return std::max({even, part_, parts_.begin + 1});
}

int64_t Job::spare(const Sharing& rule) const {
  const Lock lock(mutex_);
  if (chunks_.size() <= 0) return 0;
  const int64_t at_hand = parts_.end - part_, behind = chunks_behind();
  if (!begun_ || (!rule.in_order && behind > 0)) return at_hand + behind * parts_.size();
  const bool worth_it = parts_.end - middle() >= rule.least_parts;
  if (behind == 0) return worth_it ? at_hand : 0;
  return parts_.size() > rule.least_parts ? at_hand + behind * parts_.size() : 0;
}

bool Job::give(const Sharing& rule, Rectangle& half) {
  const Lock lock(mutex_);
  if (chunks_.size() <= 0) return false;
  if (!begun_) {
    half = {chunks_, parts_};
    chunks_.begin = chunks_.end;
    return true;
  }
  const int64_t behind = chunks_behind();
  if (!rule.in_order && behind > 0) {
    const int64_t from = chunks_.end - (behind + 1) / 2;
    half = {{from, chunks_.end}, parts_};
    chunks_.end = from;
    return true;
  }
  const int64_t from = middle();
  if (parts_.end - from < rule.least_parts) return false;
  half = {chunks_, {from, parts_.end}};
  parts_.end = from;
  return true;
}

Team::Team(const std::vector<Rectangle>& work, const Sharing& rule, int threads)
    : jobs_(std::max<size_t>(work.size(), threads)), rule_(rule) {
  for (size_t i = 0; i < work.size(); ++i) jobs_[i].set(work[i], false);
}

Job* Team::with_most_to_spare() {
  Job* most = nullptr;
  int64_t most_spare = 0;
  for (Job& job : jobs_) {
    const int64_t spare = job.spare(rule_);
    if (spare <= most_spare) continue;
    most_spare = spare;
    most = &job;
  }
  return most;
}

bool Team::next(int thread, Piece& piece) {
  Job& own = jobs_[thread];
  while (!failed()) {
    if (own.claim(piece)) return true;
    Job* other = with_most_to_spare();
    if (other == nullptr) return false;
    Rectangle half;
    if (other->give(rule_, half)) {
      own.set(half, true);
    } else {
      std::this_thread::yield();
    }
  }
  return false;
}

namespace {
std::atomic<void (*)()> thread_start{nullptr};
}

void on_each_thread(void (*start)()) { thread_start.store(start); }

int most_threads() {
  thread_local bool started = false;
  if (!started) {
    started = true;
    if (auto* start = thread_start.load()) start();
  }
  return omp_get_max_threads();
}

}  // namespace sparseprop
