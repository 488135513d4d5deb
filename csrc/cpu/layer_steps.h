// What a decoder layer does to single rows between its products, compiled once for every instruction set (see setup.py).
// A row's bits depend on that row alone, whatever rows come with it.
#pragma once

#include "../core/layer_ops.h"

namespace beagle::cpu {

// Rows of queries, at most, that share a key head and are taken through its keys together: each key is read once for all.
constexpr int64_t kQueries = 32;

struct LayerSteps {
  // Rows of width floats: to = norm(from); may be one place.
  void (*norm[3])(const float* from, const NormWeight& norm, int64_t width, float* to);
  void (*widen[3])(const void* from, int64_t count, float* to);
  void (*narrow[3])(const float* from, int64_t count, void* to);
  // A head, in place: the first `rotary` floats in halves, by cos and sin [rotary].
  void (*rotate[3])(float* head, const void* cos, const void* sin, int64_t rotary);
  // gate = activation(gate) * up
  void (*gate)(float* gate, const float* up, int64_t count, int32_t activation);
  // Attention of query rows first .. first + count - 1 (at most kQueries) of [nodes, heads of key head h] to the keys
  // that row b's node sees. q: [batch, nodes, heads, D], rows of nodes q_stride apart; out alike, out_stride apart.
  void (*attend[3])(const DecoderLayer& op, int64_t b, int64_t h, int64_t first, int64_t count, const float* q,
                    int64_t q_stride, float* out, int64_t out_stride, float* room);
};

const LayerSteps& layer_steps();

// Floats of scratch that `attend` needs.
int64_t attend_room(const DecoderLayer& op);

// Whether row b's table names a page for slot `slot`; without a table the slot lies in the row itself.
BEAGLE_FN bool has_page(const DecoderLayer& op, int64_t b, int64_t slot) {
  if (!op.table) return true;
  const int64_t page = op.table[b * op.table_width + slot / op.slots];
  return page >= 0 && page < op.pages;
}

// Where slot `slot` of row b's head h lies in a plane.
template <class T>
BEAGLE_FN T* slot_at(const DecoderLayer& op, const CachePlane& plane, int64_t b, int64_t h, int64_t slot) {
  int64_t place = b;
  if (op.table) {
    const int64_t page = op.table[b * op.table_width + slot / op.slots];
    place = page < 0 ? 0 : page >= op.pages ? op.pages - 1 : page;
    slot %= op.slots;
  }
  return static_cast<T*>(plane.base) + place * plane.batch + h * plane.head + slot * plane.slot;
}

}  // namespace beagle::cpu
