// Half-open ranges, and even shares of one.
#pragma once
#include <cstdint>

namespace sparseprop {

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

inline Range share(int64_t total, int64_t pieces, int64_t i) { return {total * i / pieces, total * (i + 1) / pieces}; }

}  // namespace sparseprop
