// What tree attention reads and writes: which slots a node sees, where they lie, and a row's result.
#pragma once

#include <algorithm>
#include <cmath>

#include "../core/layer_ops.h"
#include "attention_tile.h"

namespace beagle::cpu {

// Where a row's windows begin: that of the node that sees furthest back, and that of the one that sees least far.
struct Starts {
  int64_t first, last;
};

inline Starts starts_of(const TreeAttention& op, int64_t b) {
  if (!op.starts || !op.nodes) return {0, 0};
  const auto [least, most] = std::minmax_element(op.starts + b * op.nodes, op.starts + (b + 1) * op.nodes);
  return {std::max<int64_t>(*least, 0), std::max<int64_t>(*most, 0)};
}

// Slots slot .. slot + 63, of which there are `count`, as node n of row b sees them.
inline __attribute__((always_inline)) uint64_t visible(const TreeAttention& op, int64_t b, int64_t n, int64_t slot,
                                                       int count) {
  uint64_t there = ~0ull >> (64 - count);
  if (op.starts) {
    const int64_t hidden = op.starts[b * op.nodes + n] - slot;
    if (hidden > 0) there = hidden < 64 ? there & ~0ull << hidden : 0;
  }
  const int64_t first = slot - std::max<int64_t>(op.lengths[b], 0), word = first >> 6;
  if (first <= -64 || word >= op.words) return first < 0 ? there : 0;
  const int64_t* words = op.mask + (b * op.nodes + n) * op.words;
  const int shift = int(first & 63);
  if (first < 0) return there & (~(~0ull << -first) | uint64_t(words[0]) << -first);
  uint64_t bits = uint64_t(words[word]) >> shift;
  if (shift && word + 1 < op.words) bits |= uint64_t(words[word + 1]) << (64 - shift);
  return there & bits;
}

// How many slots some node of row b sees.
inline int64_t keys_seen(const TreeAttention& op, int64_t b) {
  const int64_t length = std::max<int64_t>(op.lengths[b], 0), first = starts_of(op, b).first;
  int64_t count = std::max<int64_t>(length - first, 0);
  for (int64_t word = 0; word < op.words; ++word) {
    const int64_t hidden = first - length - 64 * word;
    if (hidden >= 64) continue;
    int64_t any = 0;
    for (int64_t n = 0; n < op.nodes; ++n) any |= op.mask[(b * op.nodes + n) * op.words + word];
    count += __builtin_popcountll(uint64_t(any) >> std::max<int64_t>(hidden, 0));
  }
  return count;
}

template <class T>
struct Plane {
  const T* base;
  int64_t stride_batch, stride_head, stride_slot;
  const T* at(const TreeAttention& op, int64_t b, int64_t h, int64_t slot) const {
    int64_t place = b;
    if (op.table) {
      const int64_t page = op.table[b * op.table_width + slot / op.slots];
      place = std::min(std::max<int64_t>(page, 0), op.pages - 1);
      slot %= op.slots;
    }
    return base + place * stride_batch + h * stride_head + slot * stride_slot;
  }
};

// Numbers from .. to - 1 of a row's result, from its sum there.
template <class T>
inline void store(const TreeAttention& op, int64_t b, int64_t h, int64_t row, int64_t from, int64_t to,
                  const float* sum, float top, float mass) {
  const int64_t group = op.heads / op.kv_heads;
  const int64_t head = h * group + row % group;
  T* out = static_cast<T*>(op.out) + ((b * op.nodes + row / group) * op.heads + head) * op.value_width;
  // far above all scores a sink takes everything: its share is infinite, and the rest 0
  if (op.sinks && top != -kInf) mass += std::exp2(op.sinks[head] * kLog2E - top);
  const float inverse = mass != 0.0f ? 1.0f / mass : 0.0f;
  for (int64_t d = from; d < to; ++d) out[d] = narrow<T>(sum[d - from] * inverse);
}

}  // namespace beagle::cpu
