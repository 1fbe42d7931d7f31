// How early to ask for memory: runs that lie pages apart begin unforeseen by the hardware prefetcher.
#pragma once
#include <cstddef>

#include "../simd/tile.h"

namespace sparseprop {

// Runs of this many bytes between what is used and what is asked for: about a KiB. Inlined by force, like all that
// prefetches: gcc takes a function that does nothing else for one without effect, and drops the call.
SPARSEPROP_INLINE constexpr ptrdiff_t runs_ahead(ptrdiff_t bytes) { return 1 + 1024 / (bytes > 0 ? bytes : 1); }

}  // namespace sparseprop
