// A decoder layer over a cache in one call: every step is shared out among the same threads, each weight is read once.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "executor.h"
#include "layer_steps.h"
#include "products.h"
#include "team.h"

namespace beagle::cpu {

int64_t attend_room(const DecoderLayer& op) {
  const auto whole = [](int64_t width) { return (width + 15) / 16 * 16; };
  const int64_t slots = op.table ? op.slots * op.table_width : op.slots, padded = whole(op.head_width);
  return kQueries * (3 * padded + whole(slots) + 64 + whole(64 * op.words)) + 64 * padded;
}

namespace {

constexpr int64_t kTaskBytes = 1 << 16;  // of a weight, that one task reads at least
constexpr int64_t kSteps = 16;           // calls of Team::each, at most

// Memory for the steps of one call, kept by its thread for the next.
class Memory {
 public:
  void need(int64_t bytes) {
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<char*>(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64)));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    used_ = 0;
  }
  template <class T = float>
  T* take(int64_t count) {
    T* found = reinterpret_cast<T*>(data_.get() + used_);
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return found;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0, used_ = 0;
};

int64_t outputs_a_task(const LinearWeight& linear) {
  const int64_t row_bytes = std::max<int64_t>(linear.width, 1) * (linear.kind == kFloat32 ? 4 : 2);
  return (kTaskBytes / row_bytes / kPanel + 1) * kPanel;
}

int64_t tasks_of(const LinearWeight& linear) {
  const int64_t step = outputs_a_task(linear);
  return linear.weight ? (linear.outputs + step - 1) / step : 0;
}

class Layer {
 public:
  Layer(const DecoderLayer& op, int threads) : op_(op), threads_(threads) {
    const int64_t inner = op.gate.outputs;
    queries_ = op.heads * op.head_width, keys_ = op.k.weight ? op.kv_heads * op.head_width : 0;
    widest_ = std::max({op.width, queries_, inner});
    tile_ = rows_ * std::max({outputs_a_task(op.q), outputs_a_task(op.o), outputs_a_task(op.gate), outputs_a_task(op.down)});
    tile_ = std::max(tile_, rows_ * (op.k.weight ? outputs_a_task(op.k) : 0));
    spare_ = std::max(attend_room(op), kPanel * padded(widest_) + 2 * tile_);
    thread_local Memory memory;
    const int64_t prepared = products().of[op.dtype].prepared(rows_, widest_);
    memory.need(4 * rows_ * (3 * op.width + queries_ + 2 * keys_ + queries_ + inner) + prepared +
                threads * (4 * spare_ + 64) + 16 * 64);
    state_ = memory.take(rows_ * op.width), normed_ = memory.take(rows_ * op.width);
    projected_ = memory.take(rows_ * op.width);
    mixed_ = memory.take(rows_ * (queries_ + 2 * keys_)), attended_ = memory.take(rows_ * queries_);
    inner_ = memory.take(rows_ * inner);
    prepared_ = memory.take<char>(prepared);
    spares_ = memory.take(threads * (spare_ + 16));
  }

  void run() {
    together(threads_, kSteps, [this](Team& team) {
      float* spare = spares_ + team.member * ((spare_ + 15) / 16 * 16);
      read(team);
      queries_and_keys(team, spare);
      attend(team, spare);
      output(team, spare);
      feed_forward(team, spare);
      if (op_.of_output && op_.k.weight) keys_of_output(team, spare);
    });
  }

 private:
  // Rows as a linear layer's weight is multiplied with, from `from`.
  void prepare(Team& team, const float* from, int64_t width, const LinearWeight& linear) {
    const Product& product = products().of[linear.kind];
    team.each(1, [&](int64_t) { product.prepare(from, width, rows_, width, prepared_); });
  }

  // Task `task` of a linear layer into columns of `to`, `stride` apart, bias added.
  void multiply(const LinearWeight& linear, int64_t task, float* to, int64_t stride, float* spare) {
    const int64_t step = outputs_a_task(linear), first = task * step, last = std::min(linear.outputs, first + step);
    const Weight weight{linear.weight, linear.outputs, linear.width, linear.stride};
    products().of[linear.kind].multiply(weight, prepared_, rows_, first, last, to + first, stride, spare);
    if (!linear.bias) return;
    float* bias = spare;
    const int64_t size = op_.dtype == kFloat32 ? 4 : 2;
    steps_.widen[op_.dtype](static_cast<const char*>(linear.bias) + first * size, last - first, bias);
    for (int64_t m = 0; m < rows_; ++m)
      for (int64_t n = first; n < last; ++n) to[m * stride + n] += bias[n - first];
  }

  void norm(const NormWeight& norm, const float* from, int64_t width, float* to) {
    steps_.norm[op_.dtype](from, norm, width, to);
  }

  void read(Team& team) {
    const int64_t size = op_.dtype == kFloat32 ? 4 : 2, width = op_.width;
    team.each(rows_, [&](int64_t m) {
      steps_.widen[op_.dtype](static_cast<const char*>(op_.x) + m * width * size, width, state_ + m * width);
      norm(op_.norm_in, state_ + m * width, width, normed_ + m * width);
    });
    prepare(team, normed_, width, op_.q);
  }

  void queries_and_keys(Team& team, float* spare) {
    const bool keys = op_.k.weight && !op_.of_output;
    const int64_t first = tasks_of(op_.q), second = keys ? tasks_of(op_.k) : 0, third = keys ? tasks_of(op_.v) : 0;
    const int64_t stride = queries_ + 2 * keys_;
    team.each(first + second + third, [&](int64_t task) {
      if (task < first) return multiply(op_.q, task, mixed_, stride, spare);
      if (task < first + second) return multiply(op_.k, task - first, mixed_ + queries_, stride, spare);
      multiply(op_.v, task - first - second, mixed_ + queries_ + keys_, stride, spare);
    });
    const int64_t parts = op_.heads + (keys ? op_.kv_heads : 0);
    team.each(op_.batch * parts, [&](int64_t task) {
      const int64_t b = task / parts, head = task % parts;
      if (head >= op_.heads) return keep(b, head - op_.heads, mixed_ + queries_, stride);
      for (int64_t n = 0; n < op_.nodes; ++n) turn(b, n, mixed_ + head * op_.head_width, stride, op_.norm_q);
    });
  }

  // Head `head` of node n, normed and turned to its position.
  float* turn(int64_t b, int64_t n, float* head, int64_t stride, const NormWeight& norm_head) {
    const int64_t row = b * op_.nodes + n, angles = row * op_.rotary * (op_.dtype == kFloat32 ? 4 : 2);
    float* place = head + row * stride;
    norm(norm_head, place, op_.head_width, place);
    steps_.rotate[op_.dtype](place, static_cast<const char*>(op_.cos) + angles,
                             static_cast<const char*>(op_.sin) + angles, op_.rotary);
    return place;
  }

  // Keys and values of head h of row b into the cache.
  void keep(int64_t b, int64_t h, float* keys, int64_t stride) {
    const int64_t all = op_.table ? op_.slots * op_.table_width : op_.slots;
    for (int64_t n = 0; n < op_.nodes; ++n) {
      const int64_t slot = std::max<int64_t>(op_.lengths[b], 0) + op_.write + n;
      const float* key = turn(b, n, keys + h * op_.head_width, stride, op_.norm_k);
      if (slot >= all) continue;
      store(op_.keys, b, h, slot, key), store(op_.values, b, h, slot, key + keys_);
    }
  }

  void store(const CachePlane& plane, int64_t b, int64_t h, int64_t slot, const float* from) {
    void* to = op_.dtype == kFloat32 ? static_cast<void*>(slot_at<float>(op_, plane, b, h, slot))
                                     : static_cast<void*>(slot_at<uint16_t>(op_, plane, b, h, slot));
    steps_.narrow[op_.dtype](from, op_.head_width, to);
  }

  void attend(Team& team, float* spare) {
    const int64_t planes = op_.batch * op_.kv_heads, queries = op_.nodes * (op_.heads / op_.kv_heads);
    int64_t chunks = (queries + kQueries - 1) / kQueries;
    if (threads_ > 1) chunks = std::max(chunks, std::min(queries, (3 * threads_ + planes - 1) / planes));
    team.each(planes * chunks, [&](int64_t task) {
      const int64_t plane = task / chunks, chunk = task % chunks;
      const int64_t first = queries * chunk / chunks, last = queries * (chunk + 1) / chunks;
      steps_.attend[op_.dtype](op_, plane / op_.kv_heads, plane % op_.kv_heads, first, last - first, mixed_,
                               queries_ + 2 * keys_, attended_, queries_, spare);
    });
  }

  // The residual stream takes what attention or the MLP gives in, by a norm of its own where there is one.
  void join(int64_t m, const NormWeight& norm_of_it) {
    float *state = state_ + m * op_.width, *given = projected_ + m * op_.width;
    norm(norm_of_it, given, op_.width, given);
    for (int64_t d = 0; d < op_.width; ++d) state[d] += op_.residual * given[d];
  }

  void output(Team& team, float* spare) {
    prepare(team, attended_, queries_, op_.o);
    team.each(tasks_of(op_.o), [&](int64_t task) { multiply(op_.o, task, projected_, op_.width, spare); });
    team.each(rows_, [&](int64_t m) {
      join(m, op_.norm_attended);
      norm(op_.norm_mlp, state_ + m * op_.width, op_.width, normed_ + m * op_.width);
    });
    prepare(team, normed_, op_.width, op_.gate);
  }

  void feed_forward(Team& team, float* spare) {
    const int64_t inner = op_.gate.outputs, step = outputs_a_task(op_.gate);
    team.each(tasks_of(op_.gate), [&](int64_t task) {
      const int64_t first = task * step, count = std::min(inner, first + step) - first;
      float* up = spare + kPanel * padded(widest_);
      multiply(op_.gate, task, inner_, inner, spare);
      multiply(op_.up, task, up - first, step, spare);
      for (int64_t m = 0; m < rows_; ++m)
        steps_.gate(inner_ + m * inner + first, up + m * step, count, op_.activation);
    });
    prepare(team, inner_, inner, op_.down);
    team.each(tasks_of(op_.down), [&](int64_t task) { multiply(op_.down, task, projected_, op_.width, spare); });
    const int64_t size = op_.dtype == kFloat32 ? 4 : 2, width = op_.width;
    team.each(rows_, [&](int64_t m) {
      join(m, op_.norm_after);
      float* state = state_ + m * width;
      norm(op_.norm_out, state, width, state);
      steps_.narrow[op_.dtype](state, width, static_cast<char*>(op_.out) + m * width * size);
      if (op_.of_output) norm(op_.norm_state, state, width, normed_ + m * width);
    });
  }

  void keys_of_output(Team& team, float* spare) {
    prepare(team, normed_, op_.width, op_.k);
    const int64_t first = tasks_of(op_.k), stride = queries_ + 2 * keys_;
    team.each(first + tasks_of(op_.v), [&](int64_t task) {
      if (task < first) return multiply(op_.k, task, mixed_ + queries_, stride, spare);
      multiply(op_.v, task - first, mixed_ + queries_ + keys_, stride, spare);
    });
    team.each(op_.batch * op_.kv_heads, [&](int64_t task) {
      keep(task / op_.kv_heads, task % op_.kv_heads, mixed_ + queries_, stride);
    });
  }

  const DecoderLayer& op_;
  const LayerSteps& steps_ = layer_steps();
  const int threads_;
  const int64_t rows_ = op_.batch * op_.nodes;
  int64_t queries_, keys_, widest_, tile_, spare_;
  float *state_, *normed_, *projected_, *mixed_, *attended_, *inner_, *spares_;
  char* prepared_;
};

}  // namespace

void decoder_layer(const DecoderLayer& op, int threads) {
  if (op.batch * op.nodes > 0) Layer(op, std::max(threads, 1)).run();
}

}  // namespace beagle::cpu
