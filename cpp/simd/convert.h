// One number at a time between float32, float64 and bfloat16, for the ragged ends of rows. Internal linkage on
// purpose: every ISA file must get its own copy, never one that another file compiled for a newer CPU.
#pragma once
#include <cstring>

#include "../kernels.h"

namespace sparseprop {
namespace {

template <class Out>
struct To;

template <>
struct To<float> {
  static inline float from(float x) { return x; }
  static inline float from(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

template <>
struct To<double> {
  static inline double from(double x) { return x; }
};

template <>
struct To<bf16> {
  // Round to nearest even; NaN stays NaN.
  static inline bf16 from(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};

}  // namespace
}  // namespace sparseprop
