// Which kernels run: the best this CPU has, capped by SPARSEPROP_MAX_ISA or set_max_isa.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace sparseprop {

std::vector<std::string> available_isas();   // slowest first
const Kernels& active_kernels();
void set_max_isa(const std::string& name);   // throws std::invalid_argument for an unknown name
int amd_family();                            // of the CPU (25: Zen 3 and 4, 26: Zen 5), 0 of another maker

template <class S>
const KernelsOf<S>& kernels_of(const Kernels& kernels) {
  if constexpr (sizeof(S) == sizeof(double)) {
    return kernels.f64;
  } else {
    return kernels.f32;
  }
}

template <class In, class Out>
const Movers<In, Out>& movers(const Kernels& kernels) {
  if constexpr (sizeof(In) == sizeof(Out)) {
    return kernels_of<In>(kernels).move;
  } else if constexpr (sizeof(In) < sizeof(Out)) {
    return kernels.from_bf16;
  } else {
    return kernels.to_bf16;
  }
}

}  // namespace sparseprop
