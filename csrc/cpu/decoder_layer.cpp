// Decoder layers over a cache in one call: every step is shared out among the same threads, each weight is read once.
#include <algorithm>

#include "buffer.h"
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

constexpr int64_t kSteps = 16;  // calls of Team::each a layer, at most

// Parts of a buffer, one after the other, each aligned as it is.
class Parts {
 public:
  explicit Parts(float* from) : next_(from) {}
  float* take(int64_t floats) {
    float* found = next_;
    next_ += (floats + 15) / 16 * 16;
    return found;
  }

 private:
  float* next_;
};

int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

int64_t outputs_a_task(const LinearWeight& linear) { return cpu::outputs_a_task(linear.kind, linear.width); }

int64_t tasks_of(const LinearWeight& linear) {
  const int64_t step = outputs_a_task(linear);
  return (linear.outputs + step - 1) / step;
}

// What the layers of one call share: their sizes, and memory for rows between steps.
struct Room {
  Room(const DecoderLayer& op, int threads)
      : count(op.batch * op.nodes), width(op.width), queries(op.heads * op.head_width),
        keys(op.k.weight ? op.kv_heads * op.head_width : 0), inner(op.gate.outputs),
        widest(std::max({width, queries, inner})) {
    spare = std::max(attend_room(op), kPanel * padded(widest) + count * outputs_a_task(op.gate));
    spare = (spare + 15) / 16 * 16;
    int64_t bytes = 0;
    for (const LinearWeight* linear : {&op.q, &op.k, &op.o, &op.gate, &op.down})
      if (linear->weight) bytes = std::max(bytes, products().of[linear->kind].prepared(count, linear->width, linear->group));
    thread_local Buffer memory;
    const int64_t floats = count * (3 * width + 2 * queries + 2 * keys + inner) + threads * spare + (bytes + 3) / 4;
    Parts parts(memory.floats(floats + 8 * 16));
    state = parts.take(count * width), normed = parts.take(count * width), projected = parts.take(count * width);
    mixed = parts.take(count * mixed_width()), attended = parts.take(count * queries);
    middle = parts.take(count * inner), spares = parts.take(threads * spare), prepared = parts.take((bytes + 3) / 4);
  }

  int64_t mixed_width() const { return queries + 2 * keys; }

  const int64_t count, width, queries, keys, inner, widest;
  int64_t spare;                                      // floats of scratch a thread
  float *state, *normed, *projected, *mixed, *attended;  // the residual stream; queries, keys and values side by side
  float *middle, *spares;
  void* prepared;  // rows as a weight is multiplied with
};

// One layer as one thread of a team goes through it.
class Layer {
 public:
  Layer(const DecoderLayer& op, const Room& rows, Team& team, int threads)
      : op_(op), rows_(rows), team_(team), threads_(threads), spare_(rows.spares + team.member * rows.spare) {}

  void run(bool first) {
    begin(first);
    if (!op_.q.weight) return keys_of_output();  // of the states that are given
    queries_and_keys();
    attend();
    output();
    feed_forward();
    if (op_.of_output && op_.k.weight) keys_of_output();
  }

 private:
  void prepare(const float* from, const LinearWeight& linear) {
    const Product& product = products().of[linear.kind];
    team_.each(1, [&](int64_t) { product.prepare(from, linear.width, rows_.count, linear.width, rows_.prepared, linear.group); });
  }

  // Task `task` of a linear layer, `step` of its outputs, bias added; `to` is where the first goes, rows are `stride` apart.
  void multiply(const LinearWeight& linear, int64_t task, int64_t step, float* to, int64_t stride) {
    const int64_t first = task * step, last = std::min(linear.outputs, first + step);
    const Weight weight{linear.weight, linear.outputs, linear.width, linear.stride, linear.scales, linear.group};
    products().of[linear.kind].multiply(weight, rows_.prepared, rows_.count, first, last, to, stride, spare_);
    if (!linear.bias) return;
    steps_.widen[op_.dtype](static_cast<const char*>(linear.bias) + first * size_of(op_.dtype), last - first, spare_);
    for (int64_t m = 0; m < rows_.count; ++m)
      for (int64_t n = 0; n < last - first; ++n) to[m * stride + n] += spare_[n];
  }

  // The same into rows of `mixed`, from column `column` on.
  void mix(const LinearWeight& linear, int64_t task, int64_t column) {
    const int64_t step = outputs_a_task(linear);
    multiply(linear, task, step, rows_.mixed + column + task * step, rows_.mixed_width());
  }

  void norm(const NormWeight& norm, const float* from, int64_t width, float* to) {
    steps_.norm[op_.dtype](from, norm, width, to);
  }

  void begin(bool first) {
    const int64_t width = rows_.width;
    team_.each(rows_.count, [&](int64_t m) {
      const void* from = static_cast<const char*>(op_.x) + m * width * size_of(op_.dtype);
      if (first) steps_.widen[op_.dtype](from, width, rows_.state + m * width);
      norm(op_.q.weight ? op_.norm_in : op_.norm_state, rows_.state + m * width, width, rows_.normed + m * width);
    });
  }

  void queries_and_keys() {
    prepare(rows_.normed, op_.q);
    const bool keys = op_.k.weight && !op_.of_output;
    const int64_t first = tasks_of(op_.q), second = first + (keys ? tasks_of(op_.k) : 0);
    team_.each(second + (keys ? tasks_of(op_.v) : 0), [&](int64_t task) {
      if (task < first) return mix(op_.q, task, 0);
      if (task < second) return mix(op_.k, task - first, rows_.queries);
      mix(op_.v, task - second, rows_.queries + rows_.keys);
    });
    const int64_t parts = op_.heads + (keys ? op_.kv_heads : 0);
    team_.each(op_.batch * parts, [&](int64_t task) {
      const int64_t b = task / parts, head = task % parts;
      if (head >= op_.heads) return keep(b, head - op_.heads);
      for (int64_t n = 0; n < op_.nodes; ++n) turn(b, n, head * op_.head_width, op_.norm_q);
    });
  }

  // The head at `column` of node n's row of `mixed`, normed and turned to its position.
  float* turn(int64_t b, int64_t n, int64_t column, const NormWeight& norm_head) {
    const int64_t row = b * op_.nodes + n, angles = row * op_.rotary * size_of(op_.dtype);
    float* head = rows_.mixed + row * rows_.mixed_width() + column;
    norm(norm_head, head, op_.head_width, head);
    if (op_.turned)
      steps_.rotate[op_.dtype](head, static_cast<const char*>(op_.cos) + angles,
                               static_cast<const char*>(op_.sin) + angles, op_.rotary);
    return head;
  }

  // Keys and values of head h of row b into the cache.
  void keep(int64_t b, int64_t h) {
    const int64_t all = op_.table ? op_.slots * op_.table_width : op_.slots;
    for (int64_t n = 0; n < op_.nodes; ++n) {
      const int64_t place = std::max<int64_t>(op_.lengths[b], 0) + op_.write + n;
      const int64_t slot = op_.ring ? place % op_.ring : place;
      const float* key = turn(b, n, rows_.queries + h * op_.head_width, op_.norm_k);
      if (slot >= all || (op_.ends && slot >= op_.ends[b]) || !has_page(op_, b, slot)) continue;
      store(op_.keys, b, h, slot, key), store(op_.values, b, h, slot, key + rows_.keys);
    }
  }

  void store(const CachePlane& plane, int64_t b, int64_t h, int64_t slot, const float* from) {
    void* to = op_.dtype == kFloat32 ? static_cast<void*>(slot_at<float>(op_, plane, b, h, slot))
                                     : static_cast<void*>(slot_at<uint16_t>(op_, plane, b, h, slot));
    steps_.narrow[op_.dtype](from, op_.head_width, to);
  }

  void attend() {
    const int64_t planes = op_.batch * op_.kv_heads, queries = op_.nodes * (op_.heads / op_.kv_heads);
    int64_t chunks = (queries + kQueries - 1) / kQueries;
    if (threads_ > 1) chunks = std::max(chunks, std::min(queries, (2 * threads_ + planes - 1) / planes));
    team_.each(planes * chunks, [&](int64_t task) {
      const int64_t plane = task / chunks, chunk = task % chunks;
      const int64_t first = queries * chunk / chunks, last = queries * (chunk + 1) / chunks;
      steps_.attend[op_.dtype](op_, plane / op_.kv_heads, plane % op_.kv_heads, first, last - first, rows_.mixed,
                               rows_.mixed_width(), rows_.attended, rows_.queries, spare_);
    });
  }

  // Row m of the residual stream takes in what attention or the MLP gives, by a norm of its own where there is one.
  float* join(int64_t m, const NormWeight& norm_of_it) {
    float *state = rows_.state + m * rows_.width, *given = rows_.projected + m * rows_.width;
    norm(norm_of_it, given, rows_.width, given);
    for (int64_t d = 0; d < rows_.width; ++d) state[d] += op_.residual * given[d];
    return state;
  }

  void project(const float* from, const LinearWeight& linear) {
    prepare(from, linear);
    const int64_t step = outputs_a_task(linear);
    team_.each(tasks_of(linear), [&](int64_t task) {
      multiply(linear, task, step, rows_.projected + task * step, rows_.width);
    });
  }

  void output() {
    project(rows_.attended, op_.o);
    team_.each(rows_.count, [&](int64_t m) {
      norm(op_.norm_mlp, join(m, op_.norm_attended), rows_.width, rows_.normed + m * rows_.width);
    });
    prepare(rows_.normed, op_.gate);
  }

  void feed_forward() {
    const int64_t step = outputs_a_task(op_.gate), width = rows_.width;
    team_.each(tasks_of(op_.gate), [&](int64_t task) {
      const int64_t first = task * step, count = std::min(rows_.inner, first + step) - first;
      float *gate = rows_.middle + first, *up = spare_ + kPanel * padded(rows_.widest);
      multiply(op_.gate, task, step, gate, rows_.inner);
      multiply(op_.up, task, step, up, step);  // in the gate's steps, also where one of the two is in bf16
      for (int64_t m = 0; m < rows_.count; ++m) steps_.gate(gate + m * rows_.inner, up + m * step, count, op_.activation);
    });
    project(rows_.middle, op_.down);
    team_.each(rows_.count, [&](int64_t m) {
      float* state = join(m, op_.norm_after);
      void* out = static_cast<char*>(op_.out) + m * width * size_of(op_.dtype);
      norm(op_.norm_out, state, width, state);
      steps_.narrow[op_.dtype](state, width, out);
      steps_.widen[op_.dtype](out, width, state);
      if (op_.of_output) norm(op_.norm_state, state, width, rows_.normed + m * width);
    });
  }

  void keys_of_output() {
    prepare(rows_.normed, op_.k);
    const int64_t first = tasks_of(op_.k);
    team_.each(first + tasks_of(op_.v), [&](int64_t task) {
      if (task < first) return mix(op_.k, task, rows_.queries);
      mix(op_.v, task - first, rows_.queries + rows_.keys);
    });
    team_.each(op_.batch * op_.kv_heads, [&](int64_t task) { keep(task / op_.kv_heads, task % op_.kv_heads); });
  }

  const DecoderLayer& op_;
  const Room& rows_;
  Team& team_;
  const LayerSteps& steps_ = layer_steps();
  const int threads_;
  float* spare_;
};

}  // namespace

void decoder_layers(const DecoderLayer* ops, int64_t count, int threads) {
  if (count < 1 || ops->batch * ops->nodes < 1) return;
  threads = std::max(threads, 1);
  const Room rows(*ops, threads);
  together(threads, kSteps * count, [&](Team& team) {
    for (int64_t i = 0; i < count; ++i) Layer(ops[i], rows, team, threads).run(i == 0);
  });
}

}  // namespace beagle::cpu
