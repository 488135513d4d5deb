#include "attention_exact.h"

#include <memory>
#include <type_traits>

#include "attention_cache.h"
#include "pool.h"

namespace beagle::cpu {
namespace {

// Slots below which a further part costs more than it saves.
constexpr int64_t kLeastSlots = 256;

int64_t in_vectors(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Up to kRows query rows of a key head, from row `first` of [nodes, group] on, and the slots that they may see, from a
// multiple of kKeys on.
struct Unit {
  int64_t b, h, first, rows, begin, end;
  int64_t span() const { return (most<int64_t>(end - begin, 0) + kKeys - 1) / kKeys * kKeys; }
};

Unit unit_of(const TreeAttention& op, int64_t number) {
  const int64_t rows = op.nodes * (op.heads / op.kv_heads), tiles = (rows + kRows - 1) / kRows;
  const int64_t plane = number / tiles, first = number % tiles * kRows, b = plane / op.kv_heads;
  const int64_t all = op.table ? op.slots * op.table_width : op.slots, begin = starts_of(op, b).first / kKeys * kKeys;
  const int64_t end = std::min(all, std::max<int64_t>(op.lengths[b], 0) + 64 * op.words);
  return {b, plane % op.kv_heads, first, std::min<int64_t>(kRows, rows - first), begin, end};
}

// Slots slot .. slot + 63 as each row of the unit sees them; what any does.
inline __attribute__((always_inline)) uint64_t see(const TreeAttention& op, const Unit& unit, int64_t slot,
                                                   uint64_t* seen) {
  const int64_t group = op.heads / op.kv_heads;
  const int count = int(std::min<int64_t>(kKeys, unit.end - slot));
  uint64_t any = 0;
  for (int64_t r = 0; r < unit.rows; ++r) {
    const int64_t row = unit.first + r;
    seen[r] = r && row % group ? seen[r - 1] : visible(op, unit.b, row / group, slot, count);
    any |= seen[r];
  }
  return any;
}

struct Slots {
  const float* at;
  int64_t stride;
};

// `count` slots from `slot` on in fp32, zeros where bit j of `any` is not set: nobody sees it, and it may hold anything.
template <class T>
inline __attribute__((always_inline)) Slots read(const TreeAttention& op, const Plane<T>& plane, const Unit& unit,
                                                 int64_t slot, int count, uint64_t any, int64_t width, float* copy) {
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
  if constexpr (std::is_same_v<T, float>)
    if (any == ~0ull >> (64 - count) && padded == width && (!op.table || op.slots % kKeys == 0))
      return {plane.at(op, unit.b, unit.h, slot), plane.stride_slot};
  for (int j = 0; j < count; ++j) {
    float* to = copy + j * padded;
    const bool there = any >> j & 1;
    if (there) widen(plane.at(op, unit.b, unit.h, slot + j), to, width, 1.0f);
    for (int64_t d = there ? width : 0; d < padded; ++d) to[d] = 0.0f;
  }
  return {copy, padded};
}

// The unit's queries [kRows][padded], scaled, zeros around.
template <class T>
inline __attribute__((always_inline)) void read_queries(const TreeAttention& op, const Unit& unit, int64_t padded,
                                                        float* query) {
  const int64_t group = op.heads / op.kv_heads;
  // a soft cap takes scores as they are, and gives them in powers of two
  const float scale = op.softcap > 0.0f ? op.scale : op.scale * kLog2E;
  std::fill_n(query, kRows * padded, 0.0f);
  for (int64_t r = 0; r < unit.rows; ++r) {
    const int64_t row = unit.first + r, head = unit.h * group + row % group;
    const T* from = static_cast<const T*>(op.q) + unit.b * op.q_batch + row / group * op.q_node + head * op.q_head;
    widen(from, query + r * padded, op.width, scale);
  }
}

int64_t floats_for_scores(const TreeAttention& op) { return (kRows + 2 * kSlab) * in_vectors(op.width); }

// Scores [kRows][span] of the slots from .. to - 1, multiples of kKeys from the unit's begin on; -inf where a row does
// not see.
template <class T>
BEAGLE_CLONES void score(const TreeAttention& op, const Unit& unit, int64_t from, int64_t to, float* scores,
                         float* room) {
  const Plane<T> keys{static_cast<const T*>(op.k), op.k_batch, op.k_head, op.k_slot};
  const Cap cap{op.softcap > 0.0f ? 1.0f / op.softcap : 0.0f, op.softcap * kLog2E};
  const int64_t padded = (op.width + kLanes - 1) / kLanes * kLanes, span = unit.span();
  float *query = room, *copy = query + kRows * padded, *turned = copy + kSlab * padded;
  read_queries<T>(op, unit, padded, query);
  for (int64_t place = from; place < to; place += kKeys) {
    uint64_t seen[kRows] = {};
    const uint64_t any = see(op, unit, unit.begin + place, seen);
    for (int half = 0; half < kKeys; half += kSlab) {
      const uint64_t part = any >> half & 0xffffffff;
      if (!part) continue;
      const Slots slab = read<T>(op, keys, unit, unit.begin + place + half, kSlab, part, op.width, copy);
      turn(slab.at, slab.stride, padded, turned);
      float* to = scores + place + half;
      int64_t r = 0;
      for (; r + 4 < unit.rows; r += 8)
        slab_scores<8>(query + r * padded, padded, turned, op.width, to + r * span, span);
      for (; r < unit.rows; r += 4)
        slab_scores<4>(query + r * padded, padded, turned, op.width, to + r * span, span);
    }
    for (int64_t r = 0; r < unit.rows; ++r) {
      float* row = scores + r * span + place;
      if (op.softcap > 0.0f && seen[r]) cap_scores<kKeys>(row, cap);
      if (seen[r] != ~0ull)
        for (int j = 0; j < kKeys; ++j) row[j] = seen[r] >> j & 1 ? row[j] : -kInf;
    }
  }
}

int64_t floats_for_values(const TreeAttention& op) {
  return kRows * (kKeys + in_vectors(op.value_width)) + kKeys * in_vectors(op.value_width);
}

// Numbers first .. last - 1, whole vectors, of the unit's results.
template <class T>
BEAGLE_CLONES void add(const TreeAttention& op, const Unit& unit, int64_t first, int64_t last, const float* scores,
                       float* room) {
  const Plane<T> values{static_cast<const T*>(op.v), op.v_batch, op.v_head, op.v_slot};
  const int64_t padded = (op.value_width + kLanes - 1) / kLanes * kLanes, span = unit.span(), width = last - first;
  float *weights = room, *sum = weights + kRows * kKeys, *copy = sum + kRows * padded;
  float top[kRows], mass[kRows] = {}, none[kRows] = {};
  std::fill_n(weights, kRows * (kKeys + padded), 0.0f);
  for (int64_t r = 0; r < unit.rows; ++r) top[r] = largest(scores + r * span, span);
  for (int64_t place = 0; place < span; place += kKeys) {
    uint64_t seen[kRows] = {};
    const uint64_t any = see(op, unit, unit.begin + place, seen);
    if (!any) continue;
    const int count = 64 - __builtin_clzll(any);
    const Slots slots = read<T>(op, values, unit, unit.begin + place, count, any, op.value_width, copy);
    for (int64_t r = 0; r < unit.rows; ++r) {
      // a row that sees no key: its scores stay 2^-inf = 0 against any finite pivot
      const float pivot = top[r] == -kInf ? 0.0f : top[r], *row = scores + r * span + place;
      for (int j = 0; j < kKeys; ++j) weights[r * kKeys + j] = exp2_of(row[j] - pivot);
    }
    for (int64_t d = 0; d < width;) {
      const float* value = slots.at + first + d;
      // each row's mass once
      float* masses = d ? none : mass;
#define ADD(count_, vecs) \
  add_in_order<count_, vecs>(weights + r * kKeys, kKeys, value, slots.stride, count, sum + r * padded + d, padded, masses + r)
      const int64_t vecs = d + 4 * kLanes <= width ? 4 : 1;
      int64_t r = 0;
      for (; r + 1 < unit.rows; r += 4) vecs == 4 ? ADD(4, 4) : ADD(4, 1);
      if (r < unit.rows) vecs == 4 ? ADD(1, 4) : ADD(1, 1);
#undef ADD
      d += vecs * kLanes;
    }
  }
  for (int64_t r = 0; r < unit.rows; ++r) {
    const int64_t end = std::min<int64_t>(last, op.value_width);
    store<T>(op, unit.b, unit.h, unit.first + r, first, end, sum + r * padded, top[r], mass[r]);
  }
}

template <class T>
void run(const TreeAttention& op, int threads) {
  const int64_t rows = op.nodes * (op.heads / op.kv_heads), tiles = (rows + kRows - 1) / kRows;
  const int64_t units = op.batch * op.kv_heads * tiles, width = in_vectors(op.value_width);
  const int64_t needed = std::max(floats_for_scores(op), floats_for_values(op));
  int64_t longest = 0;
  for (int64_t b = 0; b < op.batch; ++b)
    longest = std::max(longest, unit_of(op, b * op.kv_heads * tiles).span());
  const int64_t wanted = units ? (4 * threads + units - 1) / units : 1;
  const int64_t parts = threads == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, longest / kLeastSlots));
  if (parts == 1) {
    return parallel(units, threads, [&](int64_t number) {
      const Unit unit = unit_of(op, number);
      float *spare = room(needed + kRows * unit.span()), *scores = spare + needed;
      score<T>(op, unit, 0, unit.span(), scores, spare);
      add<T>(op, unit, 0, width, scores, spare);
    });
  }
  const std::unique_ptr<float[]> scores(new float[size_t(units * kRows * longest)]);
  parallel(units * parts, threads, [&](int64_t task) {
    const Unit unit = unit_of(op, task / parts);
    const int64_t all = unit.span() / kKeys, part = task % parts;
    const int64_t from = all * part / parts * kKeys, to = all * (part + 1) / parts * kKeys;
    score<T>(op, unit, from, to, &scores[size_t(task / parts * kRows * longest)], room(needed));
  });
  const int64_t vectors = width / kLanes, cuts = std::max<int64_t>(1, std::min(wanted, vectors));
  parallel(units * cuts, threads, [&](int64_t task) {
    const int64_t cut = task % cuts, first = vectors * cut / cuts * kLanes, last = vectors * (cut + 1) / cuts * kLanes;
    add<T>(op, unit_of(op, task / cuts), first, last, &scores[size_t(task / cuts * kRows * longest)], room(needed));
  });
}

}  // namespace

void exact_attention(const TreeAttention& op, int threads) {
  switch (op.dtype) {
    case kFloat32: return run<float>(op, threads);
    case kFloat16: return run<Half>(op, threads);
    default: return run<BFloat>(op, threads);
  }
}

}  // namespace beagle::cpu
