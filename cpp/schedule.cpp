#include "schedule.h"

#include <algorithm>

#include "kernels.h"

namespace sparseprop {
namespace {

constexpr int64_t kL1 = 24 * 1024;
constexpr int64_t kL1Copies = 36 * 1024;  // they lie side by side: forward 2 to 8 % faster than with 24 or 48
constexpr int64_t kL2 = 384 * 1024;
constexpr int64_t kMostPanel = 16 << 20;  // of a chunk whose columns lie far apart on the padded grid, in bytes for each thread
// Chunks times parts, at least: what changes threads as one. 16 evens uneven cores out a little better (forward 2 % faster
// there), and costs 3 to 7 % where they are even; 32 costs backward passes 8 %.
constexpr int64_t kPieces = 8;
// Of shifted copies, per element. Forward on 3x3 layers of 64 to 512 channels: 20 to 30 % faster at 50 % density, even where a
// copied element serves 12 products, 10 to 25 % slower at 5 (64 or 128 channels of 5 % density).
constexpr double kProductsPerCopy = 14;
constexpr int64_t kOffsets = 65536;       // a 16-bit offset reaches this far

int64_t ceil_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
int64_t groups_of(int64_t columns, int64_t lanes) { return (columns + lanes - 1) / lanes; }

unsigned log2_of(int64_t power) {
  unsigned log = 0;
  while ((int64_t{1} << log) < power) ++log;
  return log;
}

// Columns of one panel row that a tile touches.
int64_t tile_span(const Layer& layer, const Grid& grid, int64_t tile) {
  const int64_t lines = layer.kernel[0] * layer.kernel[1];
  const int64_t line = tile + (layer.kernel[2] - 1) * layer.dilation[2] / layer.stride[2] * grid.lanes;
  return std::min(lines * line, tile + grid.max_shift);
}

// A power of two: offsets are scaled by shifting.
int64_t tile_of(int64_t columns, int64_t lanes, int64_t groups) {
  int64_t tile = lanes;
  while (tile < std::min(groups * lanes, columns)) tile *= 2;
  return tile;
}

// Columns of a chunk that 16-bit offsets reach in the first and the last of the panel rows that belong together.
int64_t reachable_columns(const Grid& grid, int64_t step, int64_t lanes) {
  const int64_t last = ((kOffsets - 1) << log2_of(grid.lanes)) - grid.max_shift;
  if (last < 0) return 0;
  if (step == 1 || grid.max_shift == 0) return INT64_MAX;
  return last / (step - 1) - grid.max_shift - 2 * lanes;  // pitches are rounded up to odd vectors
}

void choose_chunks(Schedule& s, const Grid& grid, const Problem& problem, int64_t shift, int64_t element_size) {
  // No more than an eighth of the columns, so that threads and their results do not depend on each other.
  const int64_t share = std::max(s.tile, ceil_to((grid.columns + 7) / 8, s.tile));
  const int64_t fit = std::max(kL2 / (problem.panel_rows * element_size) - shift, shift);
  s.chunk = std::clamp(fit / s.tile * s.tile, s.tile, share);
  s.chunks = (grid.columns + s.chunk - 1) / s.chunk;
}

// A panel of rows of at least `columns`, one after the other.
void choose_pitch(Schedule& s, int64_t columns, int64_t rows, int64_t lanes) {
  int64_t pitch = ceil_to(columns, lanes);
  if (pitch / lanes % 2 == 0) pitch += lanes;  // odd lines: rows spread over the cache's sets
  s.panel = {pitch, s.tile, s.tile};
  s.panel_size = rows * pitch;
}

void choose_panel(Schedule& s, const Grid& grid, int64_t rows, int64_t lanes) {
  if (grid.max_shift > 0) return choose_pitch(s, s.chunk + grid.max_shift, rows, lanes);
  s.panel = {s.tile, s.tile, rows * s.tile};
  s.panel_size = rows * s.chunk;
}

// Tried on a Zen 4: parts of 8 to 32 KiB, whose output tile stays in L1 beside a block of 8 to 28: 0 to 3 % slower at 32, up to
// 60 below, as runs of rows of equal count become short.
void choose_parts(Schedule& s, int64_t rows, int64_t fit) {
  s.stream.part_rows = std::clamp<int64_t>(fit, 64, 1024);
  s.stream.min_parts = std::clamp<int64_t>((kPieces + s.chunks - 1) / std::max<int64_t>(1, s.chunks), 1, std::max<int64_t>(1, rows / 32));
}

int64_t parts_of(const StreamShape& stream, int64_t rows) {
  return std::max(stream.min_parts, (rows + stream.part_rows - 1) / stream.part_rows);
}

// Shifted copies, where enough products read them, or offsets into the panel itself could be too long. Every part makes its
// own, so that there are fewer.
void choose_shifted(Schedule& s, const std::vector<Tap>& taps, const Problem& problem, int64_t element_size, bool must) {
  Shifted shifted(taps, s.tile, 64 / element_size);
  Schedule with = s;
  choose_parts(with, problem.rows, kL2 / (s.chunk * element_size));
  const double products = problem.nnz / double(problem.channels() * parts_of(with.stream, problem.rows)) * double(s.tile);
  if (!must && products < kProductsPerCopy * double(shifted.pitch)) return;
  s = std::move(with);
  s.shifted = std::move(shifted);
}

// What is cut into blocks: rows of a panel, or channels of shifted copies.
struct Reduced {
  int64_t rows, step;    // those that belong together
  int64_t pitch, bytes;  // from row to row, and of a tile's share of one in the nearest cache
  int64_t cache, shift;
  unsigned unit_log2;
};

void choose_blocks(StreamShape& stream, const Reduced& r, const Problem& problem) {
  const int64_t l1_rows = r.cache / r.bytes, l2_rows = kL2 / r.bytes;
  const double wanted = problem.segment * double(problem.rows) * double(std::max<int64_t>(1, r.rows)) / std::max(problem.nnz, 1e-3);
  int64_t block = std::max(l1_rows, std::min(l2_rows, int64_t(std::min(wanted, 1e9))));
  if (wanted > 4.0 * l2_rows) block = r.rows;
  // Offsets in single elements save the kernels a shift; tiles of a very sparse layer reach further in whole rows.
  stream.unit_log2 = r.shift == 0 && std::max(block, r.step) * r.pitch < kOffsets ? 0 : r.unit_log2;
  stream.row_pitch = r.pitch;
  const int64_t reach = (((kOffsets - 1) << stream.unit_log2) - r.shift) / r.pitch;
  block = std::min(block, std::min(reach, r.rows));
  // equal blocks rather than a small last one
  const int64_t blocks = std::max<int64_t>(1, (r.rows + block - 1) / std::max<int64_t>(1, block));
  stream.block_rows = std::max(r.step, ceil_to((r.rows + blocks - 1) / blocks, r.step));
  if (stream.block_rows > reach) stream.block_rows = std::max(r.step, reach / r.step * r.step);
}

}  // namespace

// Batch lanes make every shifted load aligned, but at 16 times the working set and with a transpose on the way in and
// out: 1.3x slower than planes on every ResNet-50 shape, so only for tensors that are batch-last already.
int64_t choose_lanes(const Sizes& sizes, int64_t element_size, bool batch_last) {
  const int64_t lanes = 64 / element_size;
  const Triple one = {1, 1, 1};
  if (!batch_last || (sizes.in == one && sizes.out == one)) return 1;  // one position: the batch is contiguous anyway
  const int64_t groups = (sizes.batch + lanes - 1) / lanes;
  if (groups * lanes * 4 > sizes.batch * 5) return 1;
  return lanes;
}

bool goes_by_rows(const Grid& grid, int64_t element_size) {
  return grid.lanes == 1 && grid.max_shift == 0 && grid.phases.size() == 1 && grid.idle_phases.empty() &&
         grid.columns <= kMaxRowTile * 64 / element_size;
}

// Blocks of input channels are what threads share out.
Schedule make_row_schedule(const Grid& grid, const Problem& problem, int64_t element_size) {
  Schedule s{};
  s.tile = tile_of(grid.columns, 64 / element_size, kMaxRowTile);
  s.chunk = s.tile;
  s.chunks = 1;
  s.panel = {s.tile, s.tile, s.tile};
  const int64_t row_bytes = s.tile * element_size * 2;  // x and its gradient
  const auto rows_of = [&](double segment) { return int64_t(std::min(segment / std::max(problem.per_panel_row(), 1e-9), 1e9)); };
  int64_t block = std::max(kL1 / row_bytes, std::min(kL2 / row_bytes, rows_of(problem.segment)));
  block = std::min(block, std::max((problem.panel_rows + kPieces - 1) / kPieces, rows_of(4)));
  s.stream.unit_log2 = block * s.tile < kOffsets ? 0 : log2_of(s.tile);
  block = std::max<int64_t>(1, std::min({block, ((kOffsets - 1) << s.stream.unit_log2) / s.tile, problem.panel_rows}));
  const int64_t blocks = std::max<int64_t>(1, (problem.panel_rows + block - 1) / block);
  s.stream.block_rows = std::max<int64_t>(1, (problem.panel_rows + blocks - 1) / blocks);
  s.stream.row_pitch = s.tile;
  s.stream.row_step = 1;
  s.stream.part_rows = std::max<int64_t>(1, problem.rows);
  s.stream.min_parts = 1;
  return s;
}

Schedule make_schedule(const Layer& layer, const Grid& grid, const std::vector<Tap>& taps, const Problem& problem, int64_t element_size) {
  Schedule s{};
  const bool half = grid.columns == grid.batch && problem.per_panel_row() <= problem.half_tile;
  const int64_t lanes = 64 / element_size, full = lanes * kMaxTile / (half ? 2 : 1);
  s.tile = tile_of(grid.columns, lanes, full / lanes);
  const int64_t shift = grid.max_shift;
  choose_chunks(s, grid, problem, shift, element_size);
  if (shift == 0) s.chunk = std::min(s.chunk, 8 * s.tile);
  const int64_t reachable = reachable_columns(grid, problem.panel_step, lanes);
  const bool too_long = reachable < s.tile;
  if (!too_long) s.chunk = std::min(s.chunk, reachable / s.tile * s.tile);
  s.chunks = (grid.columns + s.chunk - 1) / s.chunk;
  choose_panel(s, grid, problem.panel_rows, lanes);
  s.stream.row_step = problem.row_step;
  choose_parts(s, problem.rows, kL2 / 2 / (s.chunk * element_size));
  if (too_long || (problem.shifting && shift > 0 && grid.lanes == 1)) choose_shifted(s, taps, problem, element_size, too_long);
  const int64_t pitch = s.panel.row_pitch, copies = s.shifted.pitch;
  const unsigned unit_log2 = log2_of(shift == 0 ? s.tile : copies ? lanes : grid.lanes);
  if (copies > 0) {
    choose_blocks(s.stream, {problem.channels(), 1, copies, copies * element_size, kL1Copies, 0, unit_log2}, problem);
  } else {
    const int64_t bytes = tile_span(layer, grid, s.tile) * element_size;
    choose_blocks(s.stream, {problem.panel_rows, problem.panel_step, pitch, bytes, kL1, shift, unit_log2}, problem);
  }
  return s;
}

// Each tap's columns are copied out of the panel, for the products of a part's rows with them.
std::optional<Schedule> make_compact_schedule(const Grid& padded, const Grid& compact, const Triple& first, const std::vector<Tap>& taps,
                                              const Problem& problem, int64_t element_size) {
  Schedule s{};
  const int64_t lanes = 64 / element_size, groups = groups_of(compact.columns, lanes);
  const int64_t tiles = (groups + kMaxTile - 1) / kMaxTile;
  s.tile = (groups + tiles - 1) / tiles * lanes;  // equal tiles rather than a small last one
  choose_chunks(s, compact, problem, padded.max_shift, element_size);
  s.stream.row_step = 1;
  choose_parts(s, problem.rows, kL2 / (s.chunk * element_size));
  const double copied = double(problem.channels() * parts_of(s.stream, problem.rows)) * double(taps.size());
  const double halo = double(groups_of(padded.columns, lanes)) / double(groups) - 1;
  const int64_t row = compact.extent[3];
  const double stores = double(groups_of(row, lanes) * lanes) / double(row);  // of a vector each, for one of copies
  s.shifted = Shifted::apart(taps, s.tile, lanes);
  const int64_t copies = s.shifted.pitch;
  if (copies * element_size > kL1Copies) return std::nullopt;
  if (problem.nnz / copied * halo < problem.copying * std::max(1.0, stores / 2)) return std::nullopt;
  s.compact = Compact(compact, padded, first, {s.tile, s.chunk, lanes});
  choose_pitch(s, s.compact.most_padded() + padded.max_shift, problem.panel_rows, lanes);
  if (s.panel_size > kMostPanel / element_size) return std::nullopt;
  choose_blocks(s.stream, {problem.channels(), 1, copies, copies * element_size, kL1Copies, 0, log2_of(lanes)}, problem);
  return s;
}

}  // namespace sparseprop
