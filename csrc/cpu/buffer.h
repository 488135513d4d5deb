// Scratch that outlives a call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace beagle::cpu {

// Grows as it must, aligned to cache lines, and is kept for the thread's next call.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }
  float* floats(int64_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, (4 * count + 63) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace beagle::cpu
