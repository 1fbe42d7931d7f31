#include "gelu.h"

#include <algorithm>

#include "dispatch.h"
#include "team.h"

namespace sparseprop {
namespace {

constexpr int64_t kBlock = 1 << 12;   // elements that a thread takes at a time
constexpr int64_t kSerialGelu = 1 << 14;  // elements below which starting threads costs more than it saves

}  // namespace

void gelu_backward(const float* grad, const float* x, float* grad_x, int64_t n) {
  const auto backward = active_kernels().gelu_backward;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  run_each(blocks, n > kSerialGelu, [&](int64_t i) {
    const int64_t first = i * kBlock;
    backward(grad + first, x + first, grad_x + first, std::min(kBlock, n - first));
  });
}

}  // namespace sparseprop
