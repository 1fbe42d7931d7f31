// Scratch memory that one thread keeps between calls: no page faults after the first.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <sys/mman.h>

namespace sparseprop {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(data_); }

  // 64-byte aligned, contents unspecified; null when there is no memory.
  void* reserve(size_t bytes) {
    if (bytes <= size_) return data_;
    std::free(data_);
    const size_t alignment = bytes >= kHuge / 8 ? kHuge : 64;
    size_ = (bytes + alignment - 1) / alignment * alignment;
    data_ = std::aligned_alloc(alignment, size_);
    if (data_ == nullptr) size_ = 0;
#ifdef MADV_HUGEPAGE
    if (data_ != nullptr && alignment == kHuge) madvise(data_, size_, MADV_HUGEPAGE);
#endif
    return data_;
  }

  // Gives large blocks back, so that one huge layer does not hold its scratch for ever.
  void trim(size_t limit) {
    if (size_ <= limit) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sparseprop
