// The function table of one ISA, from its two vector types.
#pragma once
#include "attention.inl"
#include "backward.inl"
#include "backward_rows.inl"
#include "bitmap.inl"
#include "depthwise.inl"
#include "depthwise_grad.inl"
#include "forward.inl"
#include "gelu.inl"
#include "move.inl"
#include "norm.inl"
#include "pool.inl"
#include "transpose.inl"

namespace sparseprop {

template <class N, class S>
constexpr NormKernels<S> norm_kernels() {
  return {N::scratch_per_channel, &N::sums, &N::apply, &N::grad_sums, &N::grad_apply};
}

template <class V, class In, class Out>
constexpr Movers<In, Out> movers() {
  using M = Move<V, In, Out>;
  return {&M::copy, &M::transpose, &M::planes, &M::interleave};
}

template <class V>
constexpr KernelsOf<typename V::scalar> kernels_of() {
  using S = typename V::scalar;
  constexpr int group = lanes<S>() / V::width;  // vectors per lane group
  return {{&forward_tile<V, group>, &forward_tile<V, 2 * group>, &forward_tile<V, 3 * group>,
           &forward_tile<V, 4 * group>, &forward_tile<V, 5 * group>, &forward_tile<V, 6 * group>,
           &forward_tile<V, 7 * group>, &forward_tile<V, 8 * group>},
          {&backward_tile<V, group>, &backward_tile<V, 2 * group>, &backward_tile<V, 3 * group>,
           &backward_tile<V, 4 * group>, &backward_tile<V, 5 * group>, &backward_tile<V, 6 * group>,
           &backward_tile<V, 7 * group>, &backward_tile<V, 8 * group>},
          {&backward_rows<V, group>, &backward_rows<V, 2 * group>},
          &Bitmap<V>::forward,
          &Bitmap<V>::backward,
          &Transpose<V>::gather,
          &Transpose<V>::scatter,
          &copy_runs<V>,
          V::width,
          &Sums<V>::zero,
          &Sums<V>::rows,
          movers<V, S, S>(),
          norm_kernels<Norm<V, true>, S>(),
          norm_kernels<Norm<V, false>, S>(),
          &MaxPool<V>::row,
          &Depthwise<V>::pad,
          &Depthwise<V>::forward,
          &DepthwiseGrad<V>::run};
}

template <class F32, class F64>
constexpr Kernels make_kernels(const char* name) {
  return {name,
          kernels_of<F32>(),
          kernels_of<F64>(),
          movers<F32, bf16, float>(),
          movers<F32, float, bf16>(),
          {&product<F32>, &Softmax<F32>::forward, &Softmax<F32>::backward, &scale_rows<F32>},
          &Gelu<F32>::backward};
}

}  // namespace sparseprop
