// How the columns of a call are cut: tiles (registers), chunks (a packed panel in L2), tasks (threads).
#pragma once
#include <cstdint>
#include <optional>

#include "compact.h"
#include "lowering.h"
#include "panel.h"
#include "shifted.h"
#include "stream.h"

namespace sparseprop {

struct Schedule {
  int64_t tile;          // columns per tile
  int64_t chunk;         // columns per chunk, a multiple of tile
  int64_t chunks;
  int64_t panel_size;    // elements; 0 by rows, which have no panel of the whole input
  PanelShape panel;      // of a chunk with its halo
  Shifted shifted;       // of a block of the panel's channels for each tile
  Compact compact;       // used where columns have no halo: a shifted copy for each tap
  StreamShape stream;
};

struct Problem {
  int64_t rows;        // of the output of this direction
  int64_t panel_rows;  // reduced over
  int64_t row_step;    // rows that belong together (phases of one channel)
  int64_t panel_step;
  double nnz;
  double segment;      // non-zeros per segment below which partial sums cost more than L1 saves
  double half_tile;    // density up to which tiles of half the width are faster where columns are batch entries
  bool shifting;       // shifted copies may pay
  double copying;      // products that cost as much as copying an element for them

  int64_t channels() const { return panel_rows / panel_step; }  // reduced over
  double per_panel_row() const { return nnz / (double(rows) * double(panel_rows > 0 ? panel_rows : 1)); }  // and row
};

// Whether a backward pass walks the pattern by output rows: one tile of columns, each non-zero on columns of its own.
bool goes_by_rows(const Grid& grid, int64_t element_size);
Schedule make_row_schedule(const Grid& grid, const Problem& problem, int64_t element_size);
// `taps`: where each finds its columns in a panel.
Schedule make_schedule(const Layer& layer, const Grid& grid, const std::vector<Tap>& taps, const Problem& problem, int64_t element_size);
// On the columns of `compact`, which lie behind `first` on the padded grid, if that pays.
std::optional<Schedule> make_compact_schedule(const Grid& padded, const Grid& compact, const Triple& first, const std::vector<Tap>& taps,
                                              const Problem& problem, int64_t element_size);
int64_t choose_lanes(const Sizes& sizes, int64_t element_size, bool batch_last);

}  // namespace sparseprop
