#include "attention.h"

#include <limits>

#include "run.h"

namespace sparseprop {
namespace {

constexpr int64_t kLanes = lanes<float>();
constexpr int64_t kScoreBytes = 96 * 1024;  // of a block of scores, of which the backward pass has two

// Rows an odd number of cache lines apart, so that a column of a block is spread over the cache's sets.
int64_t odd_lines(int64_t columns) { return (ceil_div(columns, kLanes) | 1) * kLanes; }

// The scratch of one head. Panels of q, k, v and of gradients are copies: rows of a tensor lie kilobytes apart.
class Head {
 public:
  Head(const AttentionSizes& sizes, bool backward)
      : s_(sizes), pitch_(odd_lines(sizes.keys)), columns_(ceil_div(sizes.keys, kLanes) * kLanes),
        wide_(odd_lines(sizes.width)), value_wide_(odd_lines(sizes.value_width)),
        block_(std::min<int64_t>(sizes.queries, std::max<int64_t>(24, kScoreBytes / 4 / pitch_ / 6 * 6))) {
    q_ = pieces_.add<float>(s_.queries * wide_);
    k_transposed_ = pieces_.add<float>(s_.width * pitch_);
    scores_ = pieces_.add<float>(block_ * pitch_);
    out_ = pieces_.add<float>(block_ * std::max(wide_, value_wide_));
    if (!backward) {
      v_ = pieces_.add<float>(s_.keys * value_wide_);
      return;
    }
    grad_scores_ = pieces_.add<float>(block_ * pitch_);
    grad_out_ = pieces_.add<float>(s_.queries * value_wide_);
    k_ = pieces_.add<float>(s_.keys * wide_);
    v_transposed_ = pieces_.add<float>(s_.value_width * pitch_);
    grad_k_ = pieces_.add<float>(s_.keys * wide_);
    grad_v_ = pieces_.add<float>(s_.keys * value_wide_);
  }
  size_t bytes() const { return pieces_.bytes(); }

  void forward(void* scratch, int64_t b, int64_t h, const Heads& q, const Heads& k, const Heads& v, const AttentionMask& mask,
               const Heads& out, float* stats) const {
    load_queries_and_keys(scratch, b, h, q, k);
    const Panel values{at<float>(scratch, v_), value_wide_}, scores{at<float>(scratch, scores_), pitch_},
        rows{at<float>(scratch, out_), value_wide_};
    float* const factors = stats + s_.queries;
    copy_rows({v.of(b, h), v.row}, values, s_.keys, s_.value_width);
    for (int64_t first = 0; first < s_.queries; first += block_) {
      const int64_t n = std::min(block_, s_.queries - first);
      fill_scores(scratch, b, h, first, n, mask);
      table_.softmax({n, columns_, pitch_, scores.data, nullptr, stats + first, factors + first});
      product(n, s_.value_width, s_.keys, scores, values, rows);
      table_.scale({n, s_.value_width, rows.data, rows.pitch, factors + first, 1, out.of(b, h) + first * out.row, out.row});
    }
  }

  void backward(void* scratch, int64_t b, int64_t h, const Heads& q, const Heads& k, const Heads& v, const AttentionMask& mask,
                const float* stats, const Heads& grad_out, const Heads& grad_q, const Heads& grad_k, const Heads& grad_v) const {
    load_queries_and_keys(scratch, b, h, q, k);
    const Panel keys{at<float>(scratch, k_), wide_}, values{at<float>(scratch, v_transposed_), pitch_},
        queries{at<float>(scratch, q_), wide_}, grads{at<float>(scratch, grad_out_), value_wide_},
        scores{at<float>(scratch, scores_), pitch_}, grad_scores{at<float>(scratch, grad_scores_), pitch_},
        rows{at<float>(scratch, out_), wide_}, of_keys{at<float>(scratch, grad_k_), wide_},
        of_values{at<float>(scratch, grad_v_), value_wide_};
    copy_rows({k.of(b, h), k.row}, keys, s_.keys, s_.width);
    transpose({v.of(b, h), v.row}, s_.value_width, values);
    copy_rows({grad_out.of(b, h), grad_out.row}, grads, s_.queries, s_.value_width);
    float* const shifts = const_cast<float*>(stats);  // read only
    for (int64_t first = 0; first < s_.queries; first += block_) {
      const int64_t n = std::min(block_, s_.queries - first);
      fill_scores(scratch, b, h, first, n, mask);
      product(n, columns_, s_.value_width, grads.from(first), values, grad_scores);
      table_.softmax_grad({n, columns_, pitch_, scores.data, grad_scores.data, shifts + first, shifts + s_.queries + first});
      add_transposed_product(s_.keys, s_.value_width, n, scores, grads.from(first), of_values, first > 0);
      add_transposed_product(s_.keys, s_.width, n, grad_scores, queries.from(first), of_keys, first > 0);
      product(n, s_.width, s_.keys, grad_scores, keys, rows);
      table_.scale({n, s_.width, rows.data, rows.pitch, &s_.scale, 0, grad_q.of(b, h) + first * grad_q.row, grad_q.row});
    }
    copy_rows(of_keys, {grad_k.of(b, h), grad_k.row}, s_.keys, s_.width);
    copy_rows(of_values, {grad_v.of(b, h), grad_v.row}, s_.keys, s_.value_width);
  }

 private:
  struct Panel {
    float* data;
    int64_t pitch;

    Panel from(int64_t row) const { return {data + row * pitch, pitch}; }
  };

  void product(int64_t rows, int64_t columns, int64_t depth, Panel a, Panel b, Panel c) const {
    table_.product({rows, columns, depth, a.data, a.pitch, false, b.data, b.pitch, c.data, c.pitch, false});
  }
  void add_transposed_product(int64_t rows, int64_t columns, int64_t depth, Panel a, Panel b, Panel c, bool add) const {
    table_.product({rows, columns, depth, a.data, a.pitch, true, b.data, b.pitch, c.data, c.pitch, add});
  }
  void copy_rows(Panel from, Panel to, int64_t rows, int64_t width) const {
    constexpr float one = 1;
    table_.scale({rows, width, from.data, from.pitch, &one, 0, to.data, to.pitch});
  }
  // Rows of keys become columns; those beyond the last one are 0.
  void transpose(Panel from, int64_t width, Panel to) const {
    kernels_.f32.move.transpose(to.data, to.pitch, from.data, from.pitch, s_.keys, width);
    kernels_.f32.zero(to.data + s_.keys, to.pitch, width, columns_ - s_.keys);
  }
  void load_queries_and_keys(void* scratch, int64_t b, int64_t h, const Heads& q, const Heads& k) const {
    table_.scale({s_.queries, s_.width, q.of(b, h), q.row, &s_.scale, 0, at<float>(scratch, q_), wide_});
    transpose({k.of(b, h), k.row}, s_.width, {at<float>(scratch, k_transposed_), pitch_});
  }

  void fill_scores(void* scratch, int64_t b, int64_t h, int64_t first, int64_t n, const AttentionMask& mask) const {
    const Panel queries{at<float>(scratch, q_), wide_}, scores{at<float>(scratch, scores_), pitch_};
    product(n, columns_, s_.width, queries.from(first), {at<float>(scratch, k_transposed_), pitch_}, scores);
    for (int64_t r = 0; r < n; ++r) hide(scores.data + r * pitch_, b, h, first + r, mask);
  }

  void hide(float* row, int64_t b, int64_t h, int64_t query, const AttentionMask& mask) const {
    constexpr float hidden = -std::numeric_limits<float>::infinity();
    const int64_t from = b * mask.batch + h * mask.head + query * mask.query;
    if (mask.data && mask.bytes) {
      const auto* seen = static_cast<const uint8_t*>(mask.data) + from;
      for (int64_t m = 0; m < s_.keys; ++m) row[m] = seen[m * mask.key] ? row[m] : hidden;
    } else if (mask.data) {
      const auto* bias = static_cast<const float*>(mask.data) + from;
      for (int64_t m = 0; m < s_.keys; ++m) row[m] += bias[m * mask.key];
    }
    std::fill(row + (s_.causal ? std::min(query + 1, s_.keys) : s_.keys), row + columns_, hidden);
  }

  const AttentionSizes& s_;
  const int64_t pitch_, columns_, wide_, value_wide_, block_;
  const Kernels& kernels_ = active_kernels();
  const AttentionKernels& table_ = kernels_.attention;
  Pieces pieces_;
  size_t q_, k_transposed_, scores_, out_, v_ = 0;
  size_t grad_scores_ = 0, grad_out_ = 0, k_ = 0, v_transposed_ = 0, grad_k_ = 0, grad_v_ = 0;  // backward alone
};

template <class Task>
void for_heads(const AttentionSizes& s, size_t scratch_bytes, Task task) {
  const bool parallel = s.batch * s.heads * s.queries * s.keys * (s.width + s.value_width) > (1 << 17);
  run_list(s.batch * s.heads, parallel, [&] {
    return [&, scratch = scratch_of(scratch_bytes)](int64_t i) { task(i / s.heads, i % s.heads, scratch); };
  });
}

}  // namespace

void attention(const AttentionSizes& s, const Heads& q, const Heads& k, const Heads& v, const AttentionMask& mask,
               const Heads& out, float* stats) {
  const Head head(s, false);
  for_heads(s, head.bytes(), [&](int64_t b, int64_t h, void* scratch) {
    head.forward(scratch, b, h, q, k, v, mask, out, stats + (b * s.heads + h) * 2 * s.queries);
  });
}

void attention_backward(const AttentionSizes& s, const Heads& q, const Heads& k, const Heads& v, const AttentionMask& mask,
                        const float* stats, const Heads& grad_out, const Heads& grad_q, const Heads& grad_k,
                        const Heads& grad_v) {
  const Head head(s, true);
  for_heads(s, head.bytes(), [&](int64_t b, int64_t h, void* scratch) {
    head.backward(scratch, b, h, q, k, v, mask, stats + (b * s.heads + h) * 2 * s.queries, grad_out, grad_q, grad_k, grad_v);
  });
}

}  // namespace sparseprop
