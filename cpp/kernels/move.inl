// Moving data between tensors and panels, one contiguous run or one blocked transpose at a time.
#pragma once
#include "../kernels.h"
#include "../simd/convert.h"

namespace sparseprop {

template <class V, class In, class Out>
struct Move {
  static void copy(Out* dst, Layout2 to, const In* src, Layout2 from, ptrdiff_t rows, ptrdiff_t cols) {
    for (ptrdiff_t r = 0; r < rows; ++r, dst += to.pitch, src += from.pitch) {
      if (from.stride == 1 && to.stride == 1) {
        // Rows lie pages apart: the hardware prefetcher starts anew on each, so ask for the row after next.
        if (r + 2 < rows)
          for (ptrdiff_t i = 0; i < cols; i += 64 / static_cast<ptrdiff_t>(sizeof(In))) {
            __builtin_prefetch(src + 2 * from.pitch + i);
            __builtin_prefetch(dst + 2 * to.pitch + i, 1);
          }
        contiguous(dst, src, cols);
      } else if (from.stride == 2 && to.stride == 1) {
        every_other(dst, src, cols);
      } else {
        for (ptrdiff_t i = 0; i < cols; ++i) dst[i * to.stride] = To<Out>::from(src[i * from.stride]);
      }
    }
  }

  static void planes(Out* dst, Layout3 to, const In* src, Layout3 from, Extent3 extent) {
    for (ptrdiff_t p = 0; p < extent.planes; ++p, dst += to.plane, src += from.plane) {
      if (p + 2 < extent.planes) {
        ask<0>(src + 2 * from.plane, from, extent);
        ask<1>(dst + 2 * to.plane, to, extent);
      }
      for (ptrdiff_t r = 0; r < extent.rows; ++r) {
        Out* d = dst + r * to.pitch;
        const In* s = src + r * from.pitch;
        const ptrdiff_t n = extent.cols, zeros = r + 1 < extent.rows ? extent.zeros : 0;
        if (from.stride == 1 && to.stride == 1) {
          contiguous(d, s, n, zeros);
          continue;
        }
        if (from.stride == 2 && to.stride == 1) {
          every_other(d, s, n);
        } else {
          for (ptrdiff_t i = 0; i < n; ++i) d[i * to.stride] = To<Out>::from(s[i * from.stride]);
        }
        if (zeros > 0) finish(V::zero(), d + n, 0, zeros);
      }
    }
  }

  static void transpose(Out* dst, ptrdiff_t dst_pitch, const In* src, ptrdiff_t src_pitch, ptrdiff_t rows,
                        ptrdiff_t cols) {
    constexpr ptrdiff_t w = V::width;
    const ptrdiff_t whole_rows = rows / w * w, whole_cols = cols / w * w;
    // Along the rows of whichever side is spread over more pages, which the hardware prefetcher does not see coming:
    // the next strip is asked for by hand (1 MB from memory: 189 -> 132 us in, 386 -> 340 us out; from cache +5 us).
    if (dst_pitch > src_pitch) {
      for (ptrdiff_t j = 0; j < whole_cols; j += w)
        for (ptrdiff_t i = 0; i < whole_rows; i += w) {
          if (j + 2 * w <= whole_cols)
            for (ptrdiff_t k = 0; k < w; ++k) __builtin_prefetch(dst + (j + w + k) * dst_pitch + i, 1);
          block(dst, dst_pitch, src, src_pitch, i, j);
        }
    } else {
      for (ptrdiff_t i = 0; i < whole_rows; i += w)
        for (ptrdiff_t j = 0; j < whole_cols; j += w) {
          if (i + 2 * w <= whole_rows)
            for (ptrdiff_t k = 0; k < w; ++k) __builtin_prefetch(src + (i + w + k) * src_pitch + j);
          block(dst, dst_pitch, src, src_pitch, i, j);
        }
    }
    corner(dst + whole_cols * dst_pitch, dst_pitch, src + whole_cols, src_pitch, whole_rows, cols - whole_cols);
    corner(dst + whole_rows, dst_pitch, src + whole_rows * src_pitch, src_pitch, rows - whole_rows, cols);
  }

 private:
  // Rows of a plane lie side by side, planes pages apart, where the hardware prefetcher starts anew. Inlined by force:
  // gcc takes a function that does nothing but prefetch for one without effect, and drops the call.
  template <int write, class T>
  static inline __attribute__((always_inline)) void ask(const T* plane, Layout3 layout, Extent3 extent) {
    const ptrdiff_t length = (extent.rows - 1) * layout.pitch + extent.cols * layout.stride;
    for (ptrdiff_t i = 0; i < length; i += 64 / static_cast<ptrdiff_t>(sizeof(T))) __builtin_prefetch(plane + i, write);
  }

  static inline void contiguous(Out* dst, const In* src, ptrdiff_t n, ptrdiff_t zeros = 0) {
    ptrdiff_t i = 0;
    for (; i + V::width <= n; i += V::width) V::loadu(src + i).storeu(dst + i);
    if (i < n) {
      finish(V::load_some(src + i, n - i), dst + i, n - i, zeros);
    } else if (zeros > 0) {
      finish(V::zero(), dst + i, 0, zeros);
    }
  }

  // Stores the last n < width elements of a row and the zeros behind them.
  static inline void finish(V last, Out* dst, ptrdiff_t n, ptrdiff_t zeros) {
    for (ptrdiff_t i = 0, all = n + zeros; i < all; i += V::width, last = V::zero())
      all - i < V::width ? last.store_some(dst + i, all - i) : last.storeu(dst + i);
  }

  // A stride of 2 splits rows into phases: two loads and a permutation for `width` elements.
  static inline void every_other(Out* dst, const In* src, ptrdiff_t n) {
    ptrdiff_t i = 0;
    for (; i + V::width < n; i += V::width) V::load_even(src + 2 * i).storeu(dst + i);
    for (; i < n; ++i) dst[i] = To<Out>::from(src[2 * i]);
  }

  static inline void block(Out* dst, ptrdiff_t dst_pitch, const In* src, ptrdiff_t src_pitch, ptrdiff_t i, ptrdiff_t j) {
    V::transpose(dst + j * dst_pitch + i, dst_pitch, src + i * src_pitch + j, src_pitch);
  }

  static void corner(Out* dst, ptrdiff_t dst_pitch, const In* src, ptrdiff_t src_pitch, ptrdiff_t rows, ptrdiff_t cols) {
    for (ptrdiff_t j = 0; j < cols; ++j)
      for (ptrdiff_t i = 0; i < rows; ++i) dst[j * dst_pitch + i] = To<Out>::from(src[i * src_pitch + j]);
  }
};

template <class V>
struct Sums {
  using S = typename V::scalar;

  static void zero(S* dst, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t cols) {
    for (ptrdiff_t r = 0; r < rows; ++r, dst += pitch) {
      ptrdiff_t i = 0;
      for (; i + V::width <= cols; i += V::width) V::zero().storeu(dst + i);
      if (i < cols) V::zero().store_some(dst + i, cols - i);
    }
  }

  // sums[r] += row r of the panel, added up in a fixed order
  static void rows(S* sums, const S* panel, ptrdiff_t pitch, ptrdiff_t rows, ptrdiff_t cols) {
    for (ptrdiff_t r = 0; r < rows; ++r) {
      const S* row = panel + r * pitch;
      V acc = V::zero();
      ptrdiff_t i = 0;
      for (; i + V::width <= cols; i += V::width) acc = V::add(acc, V::loadu(row + i));
      S total = acc.sum();
      for (; i < cols; ++i) total += row[i];
      sums[r] += total;
    }
  }
};

}  // namespace sparseprop
