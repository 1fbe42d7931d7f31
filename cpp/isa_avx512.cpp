#include "simd/avx512.h"

#include "kernels/table.inl"

namespace sparseprop {
const Kernels avx512_kernels = make_kernels<avx512::F32, avx512::F64>("avx512");
}
