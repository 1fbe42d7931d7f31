#include "simd/scalar.h"

#include "kernels/table.inl"

namespace sparseprop {
const Kernels scalar_kernels = make_kernels<scalar::F32, scalar::F64>("scalar");
}
