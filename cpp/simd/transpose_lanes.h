// Lane j of vector i becomes lane i of vector j, for vectors without an order of shuffles of their own.
#pragma once

namespace sparseprop {

template <class V>
inline void transpose_lanes(V (&x)[V::width]) {
  typename V::scalar lanes[V::width][V::width], turned[V::width][V::width];
  for (int i = 0; i < V::width; ++i) x[i].storeu(lanes[i]);
  for (int i = 0; i < V::width; ++i)
    for (int j = 0; j < V::width; ++j) turned[i][j] = lanes[j][i];
  for (int i = 0; i < V::width; ++i) x[i] = V::loadu(turned[i]);
}

}  // namespace sparseprop
