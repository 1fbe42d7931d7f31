#include "interleave.h"

#include <algorithm>

#include "dispatch.h"
#include "runs.h"

namespace sparseprop {
namespace {

// Every second element of a row of the tensor, `count` of them from `element` on; `source` < 0: zeros.
struct Half {
  int64_t element, count, source;
};

class Halves {
 public:
  Halves(const Layer& layer, const Sizes& sizes, const Grid& grid, const Strides& strides, Columns columns)
      : layer_(layer), sizes_(sizes), grid_(grid), strides_(strides), columns_(columns) {}

  // `rows`: where the phase's columns begin, or negative.
  void add(const Triple& phase, int64_t rows) {
    const Placement place = place_input(layer_, sizes_, grid_, strides_, phase);
    for_each_run(grid_, place, columns_, [&](const RunOfData& run) {
      const bool row = run.step == 2;  // else a run down a column: rows hold one element of the phase each
      for (int64_t k = 0; k < (row ? 1 : run.count); ++k)
        halves_.push_back({run.element + k * run.step, row ? run.count : 1, rows < 0 ? -1 : rows + run.column + k});
    });
  }

  // Two halves are a row where one begins an element after the other, and is as long or one shorter.
  std::vector<Interleaved> joined() {
    std::sort(halves_.begin(), halves_.end(), [](const Half& a, const Half& b) { return a.element < b.element; });
    std::vector<Interleaved> rows;
    for (size_t i = 0; i < halves_.size(); ++i) {
      const Half &even = halves_[i], &odd = halves_[std::min(i + 1, halves_.size() - 1)];
      const int64_t longer = even.count - odd.count;
      if (odd.element == even.element + 1 && (longer == 0 || longer == 1)) {
        rows.push_back({even.element, even.source, odd.source, even.count + odd.count});
        ++i;
      } else {
        for (int64_t k = 0; k < even.count; ++k) rows.push_back({even.element + 2 * k, even.source < 0 ? -1 : even.source + k, -1, 1});
      }
    }
    return rows;
  }

 private:
  const Layer& layer_;
  const Sizes& sizes_;
  const Grid& grid_;
  const Strides& strides_;
  Columns columns_;
  std::vector<Half> halves_;
};

}  // namespace

bool takes_phases(const Layer& layer, const Grid& grid, const Strides& strides) {
  return layer.stride[2] == 2 && grid.lanes == 1 && strides[4] == 1 && strides[1] != 1;
}

template <class S, class Out>
void unpack_phases(const Kernels& kernels, const Layer& layer, const Sizes& sizes, const Grid& grid, Out* tensor,
                   const Strides& strides, Columns columns, const PhaseRows<S>& from) {
  Halves halves(layer, sizes, grid, strides, columns);
  for (size_t f = 0; f < grid.phases.size(); ++f) halves.add(grid.phases[f], static_cast<int64_t>(f) * from.phase_pitch);
  for (const Triple& phase : grid.idle_phases) halves.add(phase, -1);
  const std::vector<Interleaved> rows = halves.joined();
  movers<S, Out>(kernels).interleave(tensor + from.channel * strides[1], strides[1], from.data, from.pitch, from.channels,
                                     rows.data(), static_cast<ptrdiff_t>(rows.size()));
}

template void unpack_phases(const Kernels&, const Layer&, const Sizes&, const Grid&, float*, const Strides&, Columns,
                            const PhaseRows<float>&);
template void unpack_phases(const Kernels&, const Layer&, const Sizes&, const Grid&, double*, const Strides&, Columns,
                            const PhaseRows<double>&);
template void unpack_phases(const Kernels&, const Layer&, const Sizes&, const Grid&, bf16*, const Strides&, Columns,
                            const PhaseRows<float>&);

}  // namespace sparseprop
