// Scaled dot-product attention of many heads, and its gradients, a head at a time in the cache.
#pragma once
#include <cstdint>

namespace sparseprop {

struct AttentionSizes {
  int64_t batch, heads, queries, keys, width, value_width;  // widths: multiples of lanes<float>()
  float scale;
  bool causal;  // query i sees keys up to i
};

// Rows of `width` adjacent elements; strides in elements.
struct Heads {
  float* data;
  int64_t batch, head, row;

  float* of(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// What is added to the scores: floats, or bytes where 0 hides a key; data is null if there is none.
struct AttentionMask {
  const void* data;
  bool bytes;
  int64_t batch, head, query, key;  // strides in elements
};

// stats: of each query the largest score and one over the sum of the exponentials around it, (batch, heads, 2, queries). Their
// one logarithm would lose the sum beside a large score.
void attention(const AttentionSizes& sizes, const Heads& q, const Heads& k, const Heads& v, const AttentionMask& mask,
               const Heads& out, float* stats);
void attention_backward(const AttentionSizes& sizes, const Heads& q, const Heads& k, const Heads& v, const AttentionMask& mask,
                        const float* stats, const Heads& grad_out, const Heads& grad_q, const Heads& grad_k,
                        const Heads& grad_v);

}  // namespace sparseprop
