#include "exchange.h"

#include <algorithm>

#include "team.h"

namespace sparseprop {
namespace {

constexpr int64_t kTasks = 8;                  // at least, where there are as many parts
constexpr size_t kWindow = size_t{256} << 10;  // bytes of canonical values that stay in L2 meanwhile

// A block's non-zeros are one window of the canonical array in random order. Its parts are visited one after the other,
// and the window asked for before the first: part by part, lines came from memory one at a time (5 to 18 % of a backward
// pass). Tried: the exchange beside each part's kernel (0 to 9 % slower, no window), the next window asked for bit by bit
// (1 to 6 %), hardware gathers and scatters (0), loops unrolled (0).
template <int write, class S, class Task>
void for_windows(const S* canonical, const Stream& stream, bool parallel, Task task) {
  const int64_t blocks = stream.blocks(), parts = static_cast<int64_t>(stream.parts().size());
  const int64_t cuts = std::max<int64_t>(1, std::min(kTasks / blocks, parts));
  run_each(blocks * cuts, parallel && stream.nnz() >= kSerial, [&](int64_t i) {
    const int64_t block = i / cuts;
    const Range window = stream.window(block), range = share(parts, cuts, i % cuts);
    if (static_cast<size_t>(window.size()) * sizeof(S) <= kWindow) {
      for (int64_t k = window.begin; k < window.end; k += 64 / static_cast<int64_t>(sizeof(S))) {
        __builtin_prefetch(canonical + k, write);
      }
    }
    for (int64_t p = range.begin; p < range.end; ++p) task(stream.nonzeros(p, block));
  });
}

// `fixed` is `splits`, known at compile time, or 0: many splits have many columns, beside which an exchange is short.
template <int fixed, class S>
void scatter(S* out, const uint32_t* permutation, const S* dots, int64_t splits, int64_t nnz, Range range) {
  const int64_t n = fixed > 0 ? fixed : splits;
  for (int64_t k = range.begin; k < range.end; ++k) {
    S sum = dots[k];
    for (int64_t s = 1; s < n; ++s) sum += dots[s * nnz + k];
    out[permutation[k]] = sum;
  }
}

}  // namespace

template <class S>
void gather_values(S* out, const S* values, const Stream& stream, bool parallel) {
  const uint32_t* permutation = stream.permutation().data();
  for_windows<0>(values, stream, parallel, [=](Range range) {
    for (int64_t k = range.begin; k < range.end; ++k) out[k] = values[permutation[k]];
  });
}

template <class S>
void scatter_sums(S* out, const S* dots, int64_t splits, const Stream& stream, bool parallel) {
  const uint32_t* permutation = stream.permutation().data();
  const int64_t nnz = stream.nnz();
  for_windows<1>(out, stream, parallel, [=](Range range) {
    switch (splits) {
      case 1: return scatter<1>(out, permutation, dots, splits, nnz, range);
      case 2: return scatter<2>(out, permutation, dots, splits, nnz, range);
      default: return scatter<0>(out, permutation, dots, splits, nnz, range);
    }
  });
}

template void gather_values(float*, const float*, const Stream&, bool);
template void gather_values(double*, const double*, const Stream&, bool);
template void scatter_sums(float*, const float*, int64_t, const Stream&, bool);
template void scatter_sums(double*, const double*, int64_t, const Stream&, bool);

}  // namespace sparseprop
