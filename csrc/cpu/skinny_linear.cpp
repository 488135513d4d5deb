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

template <class T>
void widen(const SkinnyLinear& op, float* to) {
  for (int64_t m = 0; m < op.rows; ++m, to += op.width) {
    const T* from = static_cast<const T*>(op.x) + m * op.x_stride;
    for (int64_t k = 0; k < op.width; ++k) to[k] = to_float(from[k]);
  }
}

template <class T>
void store(const SkinnyLinear& op, const float* from, int64_t first, int64_t last) {
  for (int64_t m = 0; m < op.rows; ++m, from += last - first)
    for (int64_t n = first; n < last; ++n) static_cast<T*>(op.out)[m * op.outputs + n] = narrow<T>(from[n - first]);
}

}  // namespace

void skinny_linear(const SkinnyLinear& op, int threads) {
  thread_local Buffer wide, prepared;
  const Product& product = products().of[op.kind];
  const float* x = static_cast<const float*>(op.x);
  if (op.dtype) {
    x = wide.floats(op.rows * op.width);
    (op.dtype == 1 ? widen<Half> : widen<BFloat>)(op, wide.floats(op.rows * op.width));
  }
  void* rows = prepared.floats(product.prepared(op.rows, op.width) / 4);
  product.prepare(x, op.dtype ? op.width : op.x_stride, op.rows, op.width, rows);
  const Weight weight{op.weight, op.outputs, op.width, op.stride};
  const int64_t row_bytes = std::max<int64_t>(op.width, 1) * (op.kind ? 2 : 4);
  const int64_t step = (kTaskBytes / row_bytes / kPanel + 1) * kPanel, tasks = (op.outputs + step - 1) / step;
  parallel(tasks, threads, [&](int64_t task) {
    thread_local Buffer spare, sums;
    const int64_t first = task * step, last = std::min(op.outputs, first + step);
    float* out = sums.floats(op.rows * step);
    product.multiply(weight, rows, op.rows, first, last, out, last - first, spare.floats(kPanel * padded(op.width)));
    (op.dtype == 0 ? store<float> : op.dtype == 1 ? store<Half> : store<BFloat>)(op, out, first, last);
  });
}

}  // namespace beagle::cpu
