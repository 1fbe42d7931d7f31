// The gradient of GELU for adjacent floats, over threads.
#pragma once
#include <cstdint>

namespace sparseprop {

void gelu_backward(const float* grad, const float* x, float* grad_x, int64_t n);

}  // namespace sparseprop
