// Storing an input gradient of a layer that strides by two along the innermost dimension: two phases, row by row, at once.
#pragma once
#include "contraction.h"

namespace sparseprop {

// Rows of all phases of a layer, as the backward kernels leave them: channel c of phase f at c * pitch + f * phase_pitch.
template <class S>
struct PhaseRows {
  const S* data;
  int64_t phase_pitch, pitch;
  int64_t channel, channels;  // in the tensor
};

// Whether `unpack_phases` can do it.
bool takes_phases(const Layer& layer, const Grid& grid, const Strides& strides);

// tensor = rows[channel, columns] wherever the grid holds data, 0 in the phases that the kernel strides over. Each line of
// the tensor is written once, not once per phase and element by element (256 -> 512 channels, 1x1, 56x56, batch 32: 17.6 ->
// 9.6 ms in all).
template <class S, class Out>
void unpack_phases(const Kernels& kernels, const Layer& layer, const Sizes& sizes, const Grid& grid, Out* tensor,
                   const Strides& strides, Columns columns, const PhaseRows<S>& rows);

}  // namespace sparseprop
