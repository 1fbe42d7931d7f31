// Which kernels run: the best this CPU has, capped by SPARSEPROP_MAX_ISA or set_max_isa.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace sparseprop {

std::vector<std::string> available_isas();   // slowest first
const Kernels& active_kernels();
void set_max_isa(const std::string& name);   // throws std::invalid_argument for an unknown name

}  // namespace sparseprop
