#include "simd/avx2.h"

#include "kernels/table.inl"

namespace sparseprop {
const Kernels avx2_kernels = make_kernels<avx2::F32, avx2::F64>("avx2");
}
