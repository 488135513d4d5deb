// A few rows times a weight's rows as a linear layer stores them: the weight is read once, where it lies.
#include <algorithm>
#include <cstdlib>
#include <new>

#include "executor.h"
#include "pool.h"
#include "products.h"

namespace beagle::cpu {
namespace {

// Bytes of the weight that one task reads at least, which keeps the hand-out cheap and the threads busy alike.
constexpr int64_t kTaskBytes = 1 << 16;

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

// x in fp32, its rows padded with zeros.
template <class T>
void widen(const SkinnyLinear& op, float* to) {
  for (int64_t m = 0; m < op.rows; ++m, to += row_stride(op.width)) {
    const T* from = static_cast<const T*>(op.x) + m * op.x_stride;
    for (int64_t k = 0; k < op.width; ++k) to[k] = to_float(from[k]);
    std::fill(to + op.width, to + padded(op.width), 0.0f);
  }
}

}  // namespace

void skinny_linear(const SkinnyLinear& op, int threads) {
  thread_local Buffer wide;
  float* x = wide.floats(op.rows * row_stride(op.width));
  (op.dtype == 0 ? widen<float> : op.dtype == 1 ? widen<Half> : widen<BFloat>)(op, x);
  const int64_t row_bytes = std::max<int64_t>(op.width, 1) * (op.dtype ? 2 : 4);
  const int64_t step = (kTaskBytes / row_bytes / kPanel + 1) * kPanel, tasks = (op.outputs + step - 1) / step;
  const auto multiply = products().multiply[op.dtype];
  parallel(tasks, threads, [&](int64_t task) {
    thread_local Buffer spare;
    multiply(op, x, task * step, std::min(op.outputs, (task + 1) * step), spare.floats(kPanel * padded(op.width)));
  });
}

}  // namespace beagle::cpu
