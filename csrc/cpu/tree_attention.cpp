// Attention of tree nodes to a ragged cache: each key is read once for all nodes and the query heads that share it.
#include "../core/common.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "executor.h"
#include "pool.h"

namespace beagle::cpu {
namespace {

constexpr int kLanes = 16, kKeys = 32, kRows = 32;
// From this many rows on, a vector holds one key's scores for 16 rows instead of 16 numbers of one row.
constexpr int kAcross = 8;
constexpr float kLog2E = 1.442695040888963f;

// Unaligned, and free to alias floats; the compiler maps it to what the machine has.
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));

template <int kHalf>
inline __attribute__((always_inline)) Vec fold(Vec x) {
#if defined(__clang__)
  Vec other;
  for (int i = 0; i < kLanes; ++i) other[i] = x[(i + kHalf) % kLanes];
  return x + other;
#else
  Lanes from;
  for (int i = 0; i < kLanes; ++i) from[i] = (i + kHalf) % kLanes;
  return x + __builtin_shuffle(x, from);
#endif
}

inline __attribute__((always_inline)) float total(Vec x) { return fold<1>(fold<2>(fold<4>(fold<8>(x))))[0]; }

// 2^x for x <= 0, to fp32's last bit or two; below -126 it is 0.
inline __attribute__((always_inline)) float exp2_of(float x) {
  const float clamped = x < -126.0f ? -126.0f : x;
  const float shifted = clamped + 12582912.0f;  // rounds to the nearest integer in the low bits
  const float f = clamped - (shifted - 12582912.0f);
  float p = 1.52527338e-5f;
  p = p * f + 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  const float scaled = bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
  return x < -126.0f ? 0.0f : scaled;
}

// The rows of one tile of queries, and one tile of keys and values, in fp32 and padded to whole vectors. `query` is
// [rows][padded], or [padded][kRows] for tiles that go across rows; `score` is [keys] of a row, or [keys][kRows].
struct Scratch {
  explicit Scratch(int64_t padded)
      : query(kRows * padded), sum(kRows * padded), key(kKeys * padded), value(kKeys * padded) {}
  std::vector<float> query, sum, key, value;
  float top[kRows], mass[kRows], keep[kRows], score[kKeys * kRows];
};

inline __attribute__((always_inline)) Vec& at(float* place) { return *reinterpret_cast<Vec*>(place); }

template <class T>
inline __attribute__((always_inline)) void widen(const T* from, float* to, int64_t width, float scale) {
  for (int64_t d = 0; d < width; ++d) to[d] = to_float(from[d]) * scale;
}

// Scores of keys j .. j + 3 for one query row.
inline __attribute__((always_inline)) void dots(const float* query, const float* key, int64_t padded, float* score) {
  Vec sum[4] = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    const Vec q = *reinterpret_cast<const Vec*>(query + d);
    for (int j = 0; j < 4; ++j) sum[j] += q * *reinterpret_cast<const Vec*>(key + j * padded + d);
  }
  for (int j = 0; j < 4; ++j) score[j] = total(sum[j]);
}

// Adds a tile's keys to one query row by the online softmax; bit j of `seen` is key j.
inline __attribute__((always_inline)) void add_tile(Scratch& s, int row, uint32_t seen, int64_t padded) {
  for (int j = 0; j < kKeys; j += 4)
    if (seen >> j & 15) dots(&s.query[row * padded], &s.key[j * padded], padded, s.score + j);
  float top = s.top[row];
  for (int j = 0; j < kKeys; ++j) {
    s.score[j] = seen >> j & 1 ? s.score[j] : -kInf;
    top = s.score[j] > top ? s.score[j] : top;
  }
  if (top == -kInf) return;
  const float keep = s.top[row] == -kInf ? 0.0f : exp2_of(s.top[row] - top);
  float mass = 0.0f;
  for (int j = 0; j < kKeys; ++j) s.score[j] = exp2_of(s.score[j] - top);
  for (int j = 0; j < kKeys; ++j) mass += s.score[j];
  for (int64_t d = 0; d < padded; d += kLanes) {
    Vec* sum = reinterpret_cast<Vec*>(&s.sum[row * padded + d]);
    Vec even = *sum * keep, odd = {};
    for (int j = 0; j < kKeys; j += 2) {
      even += s.score[j] * *reinterpret_cast<const Vec*>(&s.value[j * padded + d]);
      odd += s.score[j + 1] * *reinterpret_cast<const Vec*>(&s.value[(j + 1) * padded + d]);
    }
    *sum = even + odd;
  }
  s.mass[row] = s.mass[row] * keep + mass;
  s.top[row] = top;
}

// Scores of keys j .. j + 3 for 32 rows: the queries lie by columns, so that nothing is summed across a vector.
inline __attribute__((always_inline)) void dots_across(Scratch& s, int j, int64_t padded) {
  Vec sum[4][2] = {};
  for (int64_t d = 0; d < padded; ++d) {
    const Vec low = at(&s.query[d * kRows]), high = at(&s.query[d * kRows + kLanes]);
    for (int i = 0; i < 4; ++i) {
      const float key = s.key[(j + i) * padded + d];
      sum[i][0] += key * low;
      sum[i][1] += key * high;
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) at(&s.score[(j + i) * kRows + half * kLanes]) = sum[i][half];
}

// The same for the first 16 rows of a tile that has no more, of keys j .. j + 7.
inline __attribute__((always_inline)) void dots_half(Scratch& s, int j, int64_t padded) {
  Vec sum[8] = {};
  for (int64_t d = 0; d < padded; ++d) {
    const Vec low = at(&s.query[d * kRows]);
    for (int i = 0; i < 8; ++i) sum[i] += s.key[(j + i) * padded + d] * low;
  }
  for (int i = 0; i < 8; ++i) at(&s.score[(j + i) * kRows]) = sum[i];
}

// Adds a tile's values to rows r .. r + 3, 32 numbers a row at once; a value is loaded once for the four.
template <int kVecs>
inline __attribute__((always_inline)) void add_values(Scratch& s, int r, int64_t d, int64_t padded) {
  Vec sum[4][kVecs];
  for (int i = 0; i < 4; ++i)
    for (int v = 0; v < kVecs; ++v) sum[i][v] = at(&s.sum[(r + i) * padded + d + v * kLanes]) * s.keep[r + i];
  for (int j = 0; j < kKeys; ++j) {
    Vec value[kVecs];
    for (int v = 0; v < kVecs; ++v) value[v] = at(&s.value[j * padded + d + v * kLanes]);
    for (int i = 0; i < 4; ++i)
      for (int v = 0; v < kVecs; ++v) sum[i][v] += s.score[j * kRows + r + i] * value[v];
  }
  for (int i = 0; i < 4; ++i)
    for (int v = 0; v < kVecs; ++v) at(&s.sum[(r + i) * padded + d + v * kLanes]) = sum[i][v];
}

// Adds a tile's keys to all rows by the online softmax, 16 rows a vector; bit j of seen[r] is key j for row r.
template <int kWide>
inline __attribute__((always_inline)) void add_tile_across(Scratch& s, int rows, const uint32_t* seen, bool whole,
                                                           int64_t padded) {
  if (kWide == kRows)
    for (int j = 0; j < kKeys; j += 4) dots_across(s, j, padded);
  else
    for (int j = 0; j < kKeys; j += 8) dots_half(s, j, padded);
  if (!whole)
    for (int j = 0; j < kKeys; ++j)
      for (int r = 0; r < kWide; ++r) s.score[j * kRows + r] = seen[r] >> j & 1 ? s.score[j * kRows + r] : -kInf;
  float top[kWide], mass[kWide] = {};
  for (int r = 0; r < kWide; ++r) top[r] = s.top[r];
  for (int j = 0; j < kKeys; ++j)
    for (int r = 0; r < kWide; ++r) top[r] = s.score[j * kRows + r] > top[r] ? s.score[j * kRows + r] : top[r];
  for (int r = 0; r < kWide; ++r) {
    // a row that has seen no key yet: its scores stay 2^-inf = 0 against any finite pivot
    const float pivot = top[r] == -kInf ? 0.0f : top[r];
    s.keep[r] = exp2_of(s.top[r] - pivot);
    s.top[r] = top[r];
    top[r] = pivot;
  }
  for (int j = 0; j < kKeys; ++j)
    for (int r = 0; r < kWide; ++r) {
      const float p = exp2_of(s.score[j * kRows + r] - top[r]);
      s.score[j * kRows + r] = p;
      mass[r] += p;
    }
  for (int r = 0; r < kWide; ++r) s.mass[r] = s.mass[r] * s.keep[r] + mass[r];
  for (int r = 0; r < rows; r += 4) {
    int64_t d = 0;
    for (; d + 2 * kLanes <= padded; d += 2 * kLanes) add_values<2>(s, r, d, padded);
    if (d < padded) add_values<1>(s, r, d, padded);
  }
}

// Slots slot .. slot + 31, of which there are `count`, as node n of row b sees them.
inline __attribute__((always_inline)) uint32_t visible(const TreeAttention& op, int64_t b, int64_t n, int64_t slot,
                                                       int count) {
  const uint32_t there = ~0u >> (32 - count);
  const int64_t first = slot - std::max<int64_t>(op.lengths[b], 0), word = first >> 6;
  if (first <= -32 || word >= op.words) return first < 0 ? there : 0;
  const int64_t* words = op.mask + (b * op.nodes + n) * op.words;
  if (first < 0) return there & (~(~0u << -first) | uint32_t(uint64_t(words[0]) << -first));
  const int shift = int(first & 63);
  uint64_t bits = uint64_t(words[word]) >> shift;
  if (shift > 32 && word + 1 < op.words) bits |= uint64_t(words[word + 1]) << (64 - shift);
  return there & uint32_t(bits);
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

template <class T>
void attend(const TreeAttention& op, int64_t b, int64_t h, int64_t first, int rows, Scratch& s) {
  const int64_t group = op.heads / op.kv_heads, padded = int64_t(s.query.size()) / kRows;
  const Plane<T> keys{static_cast<const T*>(op.k), op.k_batch, op.k_head, op.k_slot};
  const Plane<T> values{static_cast<const T*>(op.v), op.v_batch, op.v_head, op.v_slot};
  const bool across = rows >= kAcross;
  const float scale = op.scale * kLog2E;
  for (int r = 0; r < rows; ++r) {
    const int64_t n = (first + r) / group, head = h * group + (first + r) % group;
    const T* q = static_cast<const T*>(op.q) + b * op.q_batch + n * op.q_node + head * op.q_head;
    if (across)
      for (int64_t d = 0; d < op.width; ++d) s.query[d * kRows + r] = to_float(q[d]) * scale;
    else
      widen(q, &s.query[r * padded], op.width, scale);
  }
  std::fill_n(s.top, kRows, -kInf);
  std::fill_n(s.mass, kRows, 0.0f);
  const int64_t all = op.table ? op.slots * op.table_width : op.slots;
  const int64_t length = std::max<int64_t>(op.lengths[b], 0), end = std::min(all, length + 64 * op.words);
  for (int64_t slot = 0; slot < end; slot += kKeys) {
    const int count = int(std::min<int64_t>(kKeys, end - slot));
    const bool whole = slot + kKeys <= length && count == kKeys;
    uint32_t seen[kRows] = {}, any = 0;
    for (int r = 0; r < rows; ++r) {
      seen[r] = whole ? ~0u : visible(op, b, (first + r) / group, slot, count);
      any |= seen[r];
    }
    if (!any) continue;
    for (int j = 0; j < kKeys; ++j) {
      // a slot that nobody sees may hold anything, NaN included, and its page id may be anything
      if (any >> j & 1) {
        widen(keys.at(op, b, h, slot + j), &s.key[j * padded], op.width, 1.0f);
        widen(values.at(op, b, h, slot + j), &s.value[j * padded], op.width, 1.0f);
      } else {
        std::fill_n(&s.key[j * padded], padded, 0.0f);
        std::fill_n(&s.value[j * padded], padded, 0.0f);
      }
    }
    if (across)
      rows > kLanes ? add_tile_across<kRows>(s, rows, seen, whole, padded)
                    : add_tile_across<kLanes>(s, rows, seen, whole, padded);
    else
      for (int r = 0; r < rows; ++r) add_tile(s, r, seen[r], padded);
  }
}

template <class T> T narrow(float x);
template <> float narrow<float>(float x) { return x; }
template <> BFloat narrow<BFloat>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> Half narrow<Half>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

template <class T>
void store(const TreeAttention& op, int64_t b, int64_t h, int64_t first, int rows, const Scratch& s) {
  const int64_t group = op.heads / op.kv_heads, padded = int64_t(s.query.size()) / kRows;
  for (int r = 0; r < rows; ++r) {
    const int64_t n = (first + r) / group, head = h * group + (first + r) % group;
    T* out = static_cast<T*>(op.out) + ((b * op.nodes + n) * op.heads + head) * op.width;
    const float inverse = s.mass[r] != 0.0f ? 1.0f / s.mass[r] : 0.0f;
    for (int64_t d = 0; d < op.width; ++d) out[d] = narrow<T>(s.sum[r * padded + d] * inverse);
  }
}

template <class T>
BEAGLE_CLONES void tile(const TreeAttention& op, int64_t b, int64_t h, int64_t first, int rows, Scratch& s) {
  attend<T>(op, b, h, first, rows, s);
  store<T>(op, b, h, first, rows, s);
}

}  // namespace

void tree_attention(const TreeAttention& op, int threads) {
  const int64_t padded = (op.width + kLanes - 1) / kLanes * kLanes;
  const int64_t rows = op.nodes * (op.heads / op.kv_heads), tiles = (rows + kRows - 1) / kRows;
  // below some 100,000 products a second thread costs more than it saves
  int64_t work = 0;
  for (int64_t b = 0; b < op.batch; ++b) work += std::max<int64_t>(op.lengths[b], 0) + op.nodes;
  work *= op.nodes * op.heads * op.width;
  parallel(op.batch * op.kv_heads * tiles, work < 100000 ? 1 : threads, [&](int64_t task) {
    Scratch scratch(padded);
    const int64_t first = task % tiles * kRows, plane = task / tiles;
    const int64_t b = plane / op.kv_heads, h = plane % op.kv_heads;
    const int count = int(std::min<int64_t>(kRows, rows - first));
    switch (op.dtype) {
      case 0: return tile<float>(op, b, h, first, count, scratch);
      case 1: return tile<Half>(op, b, h, first, count, scratch);
      default: return tile<BFloat>(op, b, h, first, count, scratch);
    }
  });
}

}  // namespace beagle::cpu
