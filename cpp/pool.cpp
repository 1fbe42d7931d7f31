#include "pool.h"

#include <omp.h>

#include <algorithm>

#include "dispatch.h"

namespace sparseprop {

template <class S>
void max_pool(const Pool& p, const S* x, S* out, int64_t* index) {
  const auto kernel = kernels_of<S>(active_kernels()).max_pool_row;
  const bool parallel = p.planes * p.in[0] * p.in[1] > (1 << 15) && omp_get_max_threads() > 1 && !omp_in_parallel();
#pragma omp parallel for schedule(static) if (parallel)
  for (int64_t plane = 0; plane < p.planes; ++plane) {
    for (int64_t h = 0; h < p.out[0]; ++h) {
      const int64_t start = h * p.stride[0] - p.padding[0], first = std::max<int64_t>(start, 0);
      const int64_t rows = std::min(start + p.kernel[0], p.in[0]) - first, to = (plane * p.out[0] + h) * p.out[1];
      kernel({x + plane * p.in[0] * p.in[1], p.in[1], first, rows, p.kernel[1], p.stride[1], p.padding[1], p.out[1],
              out + to, index ? index + to : nullptr});
    }
  }
}

template void max_pool(const Pool&, const float*, float*, int64_t*);
template void max_pool(const Pool&, const double*, double*, int64_t*);

}  // namespace sparseprop
