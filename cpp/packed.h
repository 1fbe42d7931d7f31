// N:M patterns in their own storage: exactly `kept` of every `of` consecutive input channels, at every kernel position.
#pragma once
#include <cstdint>
#include <vector>

#include "entries.h"

namespace sparseprop {

// Per output channel a row of bits: log2(of) for each kept channel's place in its group, first bit lowest. Groups come
// in the order (group, kernel position), places in a group increase. No row pointers: every count is known.
struct PackedNM {
  int64_t kept, of;
  int64_t row_bytes;
  const uint8_t* bits;  // out_channels x row_bytes
};

// Rows of sorted flat weight columns.
struct Csr {
  std::vector<int64_t> row_ptr;
  std::vector<int32_t> col_idx;

  PatternRef ref() const { return {row_ptr.data(), col_idx.data(), static_cast<int64_t>(col_idx.size())}; }
};

// Throws std::invalid_argument for what is no such pattern of the layer.
Csr unpack_nm(const Layer& layer, const PackedNM& packed);

}  // namespace sparseprop
