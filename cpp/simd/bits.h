// For vectors of eight lanes whose ISA cannot unfold by a bit mask: where each lane comes from.
#pragma once
#include <cstdint>

namespace sparseprop {
namespace {

struct BitTables {
  uint8_t expand[256][8];    // number of bits set below the lane's; 128 where it is clear
  uint8_t compress[256][8];  // the lane of the i-th bit set; 128 behind the last
};

constexpr BitTables make_bit_tables() {
  BitTables t{};
  for (int bits = 0; bits < 256; ++bits) {
    int set = 0;
    for (int lane = 0; lane < 8; ++lane) t.expand[bits][lane] = t.compress[bits][lane] = 128;
    for (int lane = 0; lane < 8; ++lane) {
      if (bits >> lane & 1) {
        t.compress[bits][set] = static_cast<uint8_t>(lane);
        t.expand[bits][lane] = static_cast<uint8_t>(set++);
      }
    }
  }
  return t;
}

constexpr BitTables kBitTables = make_bit_tables();

}  // namespace
}  // namespace sparseprop
