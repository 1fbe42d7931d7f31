// What this machine can do at most, for as many threads as asked: probe THREADS
// Prints one JSON object: FMA rates in GF/s from registers and with one L1 load each, and the bandwidth in GB/s
// of reading and of copying (both directions counted) for working sets of several sizes, all threads together.
// Every number is the best of many short runs: a limit is what was possible, not what was usual.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
using Vec = float __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / sizeof(float);

#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
constexpr int kAccumulators = 12;  // 2 pipes x 4 to 5 cycles of latency, and all fit 16 registers
#define DECLARE(i) Vec a##i = splat + float(i);
#define TOTAL(i) +a##i[0]

volatile float sink;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void fma_registers(float seed, long rounds) {
  const Vec splat = Vec{} + seed;
  EACH(DECLARE)
#define STEP(i) a##i = a##i * splat + splat;
  for (long r = 0; r < rounds; ++r) {
    EACH(STEP)
  }
  sink = 0.f EACH(TOTAL);
}

void fma_loads(float seed, long rounds, const Vec* l1, int vectors) {
  const Vec splat = Vec{} + seed;
  EACH(DECLARE)
#define LOAD_STEP(i) a##i += l1[v + i] * splat;
  for (long r = 0; r < rounds; ++r) {
    for (int v = 0; v < vectors; v += kAccumulators) {
      EACH(LOAD_STEP)
    }
  }
  sink = 0.f EACH(TOTAL);
}

void read_all(float seed, const Vec* from, long vectors) {
  const Vec splat = Vec{} + seed;
  EACH(DECLARE)
#define READ_STEP(i) a##i += from[v + i];
  for (long v = 0; v + kAccumulators <= vectors; v += kAccumulators) {
    EACH(READ_STEP)
  }
  sink = 0.f EACH(TOTAL);
}

// A core of its own for each thread: threads that wait for each other by yielding may share one for as long as a measurement.
void pin(int thread) {
#if defined(__linux__)
  static const cpu_set_t allowed = [] {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) CPU_ZERO(&set);
    return set;
  }();
  int left = thread;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || left-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    return;
  }
#else
  (void)thread;
#endif
}

// Seconds of the fastest of several common runs of `body(thread)`; all threads start together.
double fastest(int threads, double budget_s, const std::function<void(int)>& body) {
  std::atomic<int> ready{0}, done{0}, round{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) {
    pool.emplace_back([&, t] {
      pin(t);
      for (int seen = 0;; ++seen) {
        ++ready;
        while (round.load() == seen) {
          if (stop.load()) return;
          std::this_thread::yield();
        }
        body(t);
        ++done;
      }
    });
  }
  double best = 1e9;
  const double start = now();
  // On a busy machine it takes many tries until all threads run at once.
  for (int r = 0; (r < 40 && now() - start < 4 * budget_s) || now() - start < budget_s; ++r) {
    while (ready.load() < threads - 1) std::this_thread::yield();
    ready = 0;
    done = 0;
    const double before = now();
    ++round;
    body(0);
    while (done.load() < threads - 1) std::this_thread::yield();
    const double took = now() - before;
    if (took < best) best = took;
  }
  while (ready.load() < threads - 1) std::this_thread::yield();
  stop = true;
  for (std::thread& thread : pool) thread.join();
  return best;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  if (threads < 1) return 2;
  pin(0);
  const float seed = 0.5f + 1e-9f * static_cast<float>(argc);
  const long rounds = 100000;
  const double flop = 2.0 * kLanes * kAccumulators * double(rounds) * threads;
  double best = fastest(threads, 0.4, [&](int) { fma_registers(seed, rounds); });
  std::printf("{\"threads\": %d, \"fma\": %.1f", threads, 1e-9 * flop / best);

  const int l1_vectors = 16 * 1024 / kBytes / kAccumulators * kAccumulators;
  std::vector<std::vector<char>> l1(threads, std::vector<char>(16 * 1024 + 64));
  best = fastest(threads, 0.4, [&](int t) {
    char* base = l1[t].data();
    base += (64 - reinterpret_cast<size_t>(base) % 64) % 64;
    fma_loads(seed, rounds * kAccumulators / l1_vectors, reinterpret_cast<const Vec*>(base), l1_vectors);
  });
  const double load_flop =
      2.0 * kLanes * double(rounds * kAccumulators / l1_vectors) * l1_vectors * double(threads);
  std::printf(", \"fma_load\": %.1f, \"memory\": [", 1e-9 * load_flop / best);

  const long sizes[] = {1L << 18, 1L << 20, 1L << 22, 1L << 24, 1L << 26, 1L << 28};
  for (const long size : sizes) {
    const long part = size / threads / 64 * 64;
    std::vector<char*> memory(threads);
    for (int t = 0; t < threads; ++t) {
      memory[t] = static_cast<char*>(std::aligned_alloc(64, part));
      std::memset(memory[t], 1 + t, part);
    }
    const long repeat = size < (1L << 24) ? (1L << 24) / size : 1;
    const double read = fastest(threads, 0.1, [&](int t) {
      for (long r = 0; r < repeat; ++r) read_all(seed, reinterpret_cast<const Vec*>(memory[t]), part / kBytes);
    });
    const double copy = fastest(threads, 0.1, [&](int t) {
      for (long r = 0; r < repeat; ++r) {
        std::memcpy(memory[t], memory[t] + part / 2, part / 2);
        asm volatile("" ::: "memory");
      }
    });
    const double moved = 1e-9 * double(part) * threads * double(repeat);
    std::printf("%s{\"bytes\": %ld, \"read\": %.1f, \"copy\": %.1f}", size == sizes[0] ? "" : ", ", size,
                moved / read, moved / copy);
    for (char* m : memory) std::free(m);
  }
  std::printf("]}\n");
  return 0;
}
