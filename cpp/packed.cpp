#include "packed.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sparseprop {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("N:M pattern refused: " + what); }

unsigned bits_of(const PackedNM& p, const Layer& layer) {
  const std::string name = std::to_string(p.kept) + ":" + std::to_string(p.of);
  unsigned bits = 0;
  while (bits < 5 && (int64_t{1} << bits) < p.of) ++bits;
  if (bits < 2 || (int64_t{1} << bits) != p.of) fail("M must be 4, 8, 16 or 32, got " + name + ".");
  if (p.kept < 1 || p.kept > p.of) fail("N must lie between 1 and M, got " + name + ".");
  const int64_t channels = layer.in_channels / layer.groups;
  if (channels % p.of != 0) fail(std::to_string(channels) + " input channels a group are no multiple of " + std::to_string(p.of) + ".");
  const int64_t wanted = (layer.row_size() / p.of * p.kept * bits + 7) / 8;
  if (p.row_bytes != wanted) fail("rows must have " + std::to_string(wanted) + " bytes, got " + std::to_string(p.row_bytes) + ".");
  return bits;
}

// Reads numbers of a few bits one after the other.
class Places {
 public:
  Places(const uint8_t* bytes, unsigned bits) : bytes_(bytes), bits_(bits) {}
  unsigned next() {
    while (held_ < bits_) {
      word_ |= static_cast<unsigned>(*bytes_++) << held_;
      held_ += 8;
    }
    const unsigned place = word_ & ((1u << bits_) - 1);
    word_ >>= bits_;
    held_ -= bits_;
    return place;
  }

 private:
  const uint8_t* bytes_;
  unsigned bits_, word_ = 0, held_ = 0;
};

// Marks a group's kept weights in `keeps`, which is laid out as the flat weight: place, then tap.
void mark_group(Places& places, const PackedNM& p, int64_t taps, std::vector<uint8_t>& keeps, int64_t row) {
  std::fill(keeps.begin(), keeps.end(), 0);
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t n = 0, before = -1; n < p.kept; ++n) {
      const int64_t place = places.next();
      if (place <= before) fail("places in a group of row " + std::to_string(row) + " do not increase.");
      keeps[place * taps + t] = 1;
      before = place;
    }
  }
}

}  // namespace

Csr unpack_nm(const Layer& layer, const PackedNM& p) {
  const unsigned bits = bits_of(p, layer);
  const int64_t taps = layer.taps(), groups = layer.row_size() / taps / p.of;
  Csr csr;
  csr.row_ptr.resize(layer.out_channels + 1);
  csr.col_idx.reserve(layer.out_channels * groups * taps * p.kept);
  std::vector<uint8_t> keeps(p.of * taps);
  for (int64_t r = 0; r < layer.out_channels; ++r) {
    Places places(p.bits + r * p.row_bytes, bits);
    for (int64_t g = 0; g < groups; ++g) {
      mark_group(places, p, taps, keeps, r);
      for (int64_t k = 0; k < p.of * taps; ++k) {
        if (keeps[k]) csr.col_idx.push_back(static_cast<int32_t>(g * p.of * taps + k));
      }
    }
    csr.row_ptr[r + 1] = static_cast<int64_t>(csr.col_idx.size());
  }
  return csr;
}

}  // namespace sparseprop
