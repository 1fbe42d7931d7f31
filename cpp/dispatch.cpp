#include "dispatch.h"

#include <cpuid.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sparseprop {
namespace {

struct Level {
  const Kernels* kernels;
  bool supported;
};

std::vector<Level> levels() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return {{&scalar_kernels, true}, {&avx2_kernels, avx2}, {&avx512_kernels, avx512}};
}

const Kernels* best_up_to(const std::string& cap) {
  const Kernels* best = nullptr;
  bool known = false;
  for (const Level& level : levels()) {
    if (known) break;
    if (level.supported) best = level.kernels;
    known = cap == level.kernels->name;
  }
  if (!known) {
    throw std::invalid_argument("SPARSEPROP_MAX_ISA names no instruction set: got '" + cap +
                                "', wanted one of scalar, avx2, avx512.");
  }
  return best;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels = [] {
    const char* cap = std::getenv("SPARSEPROP_MAX_ISA");
    return best_up_to(cap != nullptr && *cap != '\0' ? cap : "avx512");
  }();
  return kernels;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (level.supported) names.emplace_back(level.kernels->name);
  }
  return names;
}

const Kernels& active_kernels() { return *current().load(std::memory_order_relaxed); }

int amd_family() {
  __builtin_cpu_init();
  unsigned signature, b, c, d;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &signature, &b, &c, &d)) return 0;
  const int base = signature >> 8 & 15, extended = signature >> 20 & 255;
  return base == 15 ? base + extended : base;
}

void set_max_isa(const std::string& name) { current().store(best_up_to(name)); }

}  // namespace sparseprop
