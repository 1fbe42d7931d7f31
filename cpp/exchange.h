// Values and weight gradients between the canonical order, which the optimizer sees, and the order of a transposed stream.
#pragma once
#include "stream.h"

namespace sparseprop {

// The values in the order of the stream.
template <class S>
void gather_values(S* out, const S* values, const Stream& stream, bool parallel);

// Weight gradients in canonical order: the sum of `splits` arrays in the order of the stream, one behind the other.
template <class S>
void scatter_sums(S* out, const S* dots, int64_t splits, const Stream& stream, bool parallel);

}  // namespace sparseprop
