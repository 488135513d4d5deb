#include "linear.h"

#include <algorithm>

#include "buffer.h"
#include "pool.h"

namespace beagle::cpu {
namespace {

template <class T>
void widen(const Linear& op, float* to) {
  for (int64_t m = 0; m < op.rows; ++m, to += op.weight.width) {
    const T* from = static_cast<const T*>(op.x) + m * op.x_stride;
    for (int64_t k = 0; k < op.weight.width; ++k) to[k] = to_float(from[k]);
  }
}

template <class T>
void store(const Linear& op, const float* from, int64_t first, int64_t last) {
  for (int64_t m = 0; m < op.rows; ++m, from += last - first) {
    T* to = static_cast<T*>(op.out) + m * op.weight.outputs;
    for (int64_t n = first; n < last; ++n) to[n] = narrow<T>(from[n - first]);
  }
}

}  // namespace

void linear(const Linear& op, int threads) {
  thread_local Buffer wide, prepared;
  const Product& product = products().of[op.kind];
  const Weight& weight = op.weight;
  const float* x = static_cast<const float*>(op.x);
  if (op.dtype != kFloat32) {
    x = wide.floats(op.rows * weight.width);
    (op.dtype == kFloat16 ? widen<Half> : widen<BFloat>)(op, wide.floats(op.rows * weight.width));
  }
  void* rows = prepared.floats(product.prepared(op.rows, weight.width, weight.group) / 4);
  product.prepare(x, op.dtype == kFloat32 ? op.x_stride : weight.width, op.rows, weight.width, rows, weight.group);
  const int64_t step = outputs_a_task(op.kind, weight.width), tasks = (weight.outputs + step - 1) / step;
  parallel(tasks, threads, [&](int64_t task) {
    thread_local Buffer spare, sums;
    const int64_t first = task * step, last = std::min(weight.outputs, first + step);
    float* out = sums.floats(op.rows * step);
    float* room = spare.floats(kPanel * padded(weight.width));
    product.multiply(weight, rows, op.rows, first, last, out, last - first, room);
    (op.dtype == kFloat32 ? store<float> : op.dtype == kFloat16 ? store<Half> : store<BFloat>)(op, out, first, last);
  });
}

}  // namespace beagle::cpu
