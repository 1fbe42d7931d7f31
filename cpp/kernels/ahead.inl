// How early to ask for memory: runs that lie pages apart begin unforeseen by the hardware prefetcher.
#pragma once
#include <cstddef>

#include "../simd/tile.h"

namespace sparseprop {

// Runs of this many bytes between what is used and what is asked for: about three KiB, as far as memory
// is away (1 KiB: 2 to 4 % of a ResNet-50 step, 15 % of its layers with most channels). Inlined by force, like all that
// prefetches: gcc takes a function that does nothing else for one without effect, and drops the call.
SPARSEPROP_INLINE constexpr ptrdiff_t runs_ahead(ptrdiff_t bytes) { return 1 + 3072 / (bytes > 0 ? bytes : 1); }

}  // namespace sparseprop
