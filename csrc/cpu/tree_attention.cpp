// Attention of tree nodes to a ragged cache: each key is read once for all nodes and the query heads that share it.
#include "../core/common.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "executor.h"
#include "lanes.h"
#include "pool.h"

namespace beagle::cpu {
namespace {

constexpr int kLanes = 16, kKeys = 64, kRows = 32;
// From this many rows on, a vector holds one key's scores for 16 rows instead of 16 numbers of one row.
constexpr int kAcross = 10;
// Tiles of rows that one task takes through each tile of keys; keys below which a further split costs more than it saves.
constexpr int64_t kMostTiles = 8, kLeastKeys = 256;
constexpr float kLog2E = 1.442695040888963f;

using Vec = Floats<kLanes>;

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

inline __attribute__((always_inline)) Vec& at(float* place) { return *reinterpret_cast<Vec*>(place); }
inline __attribute__((always_inline)) const Vec& at(const float* place) { return *reinterpret_cast<const Vec*>(place); }

// A tile of queries and what its rows have summed so far. `query` is [rows][padded], or [padded][kRows] where scores
// are computed across rows; `sum` is [rows][padded].
struct Queries {
  std::vector<float> query, sum;
  float top[kRows], mass[kRows];
  int64_t first;
  int rows;
  bool across;
};

// A tile of keys and values in fp32, zeros past `count` up to a multiple of 16.
struct Keys {
  const float *key, *value;
  int64_t key_stride, value_stride;
  int count;
  int padded_count() const { return (count + kLanes - 1) / kLanes * kLanes; }
};

// `score` is [kRows][kKeys], or [kKeys][kRows] where it is computed across rows.
struct Scratch {
  explicit Scratch(int64_t padded) : padded(padded), key(kKeys * padded), value(kKeys * padded) {}
  int64_t padded;
  std::vector<float> key, value;
  float score[kKeys * kRows] = {}, keep[kRows] = {};
  std::vector<Queries> tiles;
};

template <class T>
inline __attribute__((always_inline)) void widen(const T* from, float* to, int64_t width, float scale) {
  for (int64_t d = 0; d < width; ++d) to[d] = to_float(from[d]) * scale;
}

// Scores of 16 keys for one query row.
inline __attribute__((always_inline)) Vec dots(const float* query, const float* key, int64_t stride, int64_t padded) {
  Vec sum[kLanes] = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    const Vec q = at(query + d);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) sum[j] += q * at(key + j * stride + d);
  }
  add_lanes<kLanes, kLanes>(sum);
  return sum[0];
}

// Scores of kCount keys for 16 kVecs rows: the queries lie by columns, so that nothing is summed across a vector.
template <int kCount, int kVecs>
inline __attribute__((always_inline)) void dots_across(const float* query, const float* key, int64_t stride,
                                                       int64_t width, float* score) {
  Vec sum[kCount][kVecs] = {};
  for (int64_t d = 0; d < width; ++d) {
    Vec q[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) q[v] = at(query + d * kRows + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[i][v] += key[i * stride + d] * q[v];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) at(score + i * kRows + v * kLanes) = sum[i][v];
}

// Adds a tile's values to kCount rows, 16 kVecs numbers a row; a value is loaded once for all of them.
template <int kCount, int kVecs>
inline __attribute__((always_inline)) void add_values(float* sum, const float* keep, const float* score,
                                                      int64_t row_stride, int64_t key_stride, const Keys& keys,
                                                      int64_t d, int64_t padded) {
  Vec total[kCount][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) total[i][v] = at(sum + i * padded + d + v * kLanes) * keep[i];
  for (int j = 0; j < keys.count; ++j) {
    Vec value[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) value[v] = at(keys.value + j * keys.value_stride + d + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) total[i][v] += score[j * key_stride + i * row_stride] * value[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) at(sum + i * padded + d + v * kLanes) = total[i][v];
}

template <int kCount, int kVecs>
inline __attribute__((always_inline)) void add_all_values(Queries& q, Scratch& s, int r, int64_t row_stride,
                                                          int64_t key_stride, const Keys& keys) {
  float* sum = &q.sum[r * s.padded];
  const float* score = s.score + r * row_stride;
  int64_t d = 0;
  for (; d + kVecs * kLanes <= s.padded; d += kVecs * kLanes)
    add_values<kCount, kVecs>(sum, s.keep + r, score, row_stride, key_stride, keys, d, s.padded);
  for (; d < s.padded; d += kLanes)
    add_values<kCount, 1>(sum, s.keep + r, score, row_stride, key_stride, keys, d, s.padded);
}

// Adds a tile's keys to few query rows by the online softmax, one row after the other; bit j of seen[r] is key j.
inline __attribute__((always_inline)) void add_tile(Queries& q, Scratch& s, const uint64_t* seen, const Keys& keys) {
  const int count = keys.padded_count();
  for (int r = 0; r < q.rows; ++r) {
    float* score = s.score + r * kKeys;
    for (int j = 0; j < count; j += kLanes)
      at(score + j) = dots(&q.query[r * s.padded], keys.key + j * keys.key_stride, keys.key_stride, s.padded);
    if (seen[r] != ~0ull)
      for (int j = 0; j < count; ++j) score[j] = seen[r] >> j & 1 ? score[j] : -kInf;
    float top = q.top[r], mass = 0.0f;
    for (int j = 0; j < count; ++j) top = score[j] > top ? score[j] : top;
    // a row that has seen no key yet: its scores stay 2^-inf = 0 against any finite pivot
    const float pivot = top == -kInf ? 0.0f : top;
    for (int j = 0; j < count; ++j) score[j] = exp2_of(score[j] - pivot);
    for (int j = 0; j < count; ++j) mass += score[j];
    s.keep[r] = exp2_of(q.top[r] - pivot);
    q.mass[r] = q.mass[r] * s.keep[r] + mass;
    q.top[r] = top;
  }
  int r = 0;
  for (; r + 1 < q.rows; r += 4) add_all_values<4, 4>(q, s, r, kKeys, 1, keys);
  if (r < q.rows) add_all_values<1, 4>(q, s, r, kKeys, 1, keys);
}

// The same for many rows, 16 a vector.
template <int kWide>
inline __attribute__((always_inline)) void add_tile_across(Queries& q, Scratch& s, const uint64_t* seen, bool whole,
                                                           int64_t width, const Keys& keys) {
  constexpr int kVecs = kWide / kLanes, kStep = 16 / kVecs;
  const int count = keys.padded_count();
  for (int j = 0; j < count; j += kStep)
    dots_across<kStep, kVecs>(q.query.data(), keys.key + j * keys.key_stride, keys.key_stride, width,
                              s.score + j * kRows);
  for (int half = 0; half < 64 && !whole; half += 32) {
    uint32_t part[kWide];
    for (int r = 0; r < kWide; ++r) part[r] = uint32_t(seen[r] >> half);
    for (int j = half; j < std::min(count, half + 32); ++j)
      for (int r = 0; r < kWide; ++r) s.score[j * kRows + r] = part[r] >> (j - half) & 1 ? s.score[j * kRows + r] : -kInf;
  }
  float top[kWide], mass[kWide] = {};
  for (int r = 0; r < kWide; ++r) top[r] = q.top[r];
  for (int j = 0; j < count; ++j)
    for (int r = 0; r < kWide; ++r) top[r] = s.score[j * kRows + r] > top[r] ? s.score[j * kRows + r] : top[r];
  for (int r = 0; r < kWide; ++r) {
    const float pivot = top[r] == -kInf ? 0.0f : top[r];
    s.keep[r] = exp2_of(q.top[r] - pivot);
    q.top[r] = top[r];
    top[r] = pivot;
  }
  for (int j = 0; j < count; ++j)
    for (int r = 0; r < kWide; ++r) {
      const float p = exp2_of(s.score[j * kRows + r] - top[r]);
      s.score[j * kRows + r] = p;
      mass[r] += p;
    }
  for (int r = 0; r < kWide; ++r) q.mass[r] = q.mass[r] * s.keep[r] + mass[r];
  for (int r = 0; r < q.rows; r += 8) add_all_values<8, 2>(q, s, r, 1, kRows, keys);
}

// Slots slot .. slot + 63, of which there are `count`, as node n of row b sees them.
inline __attribute__((always_inline)) uint64_t visible(const TreeAttention& op, int64_t b, int64_t n, int64_t slot,
                                                       int count) {
  const uint64_t there = ~0ull >> (64 - count);
  const int64_t first = slot - std::max<int64_t>(op.lengths[b], 0), word = first >> 6;
  if (first <= -64 || word >= op.words) return first < 0 ? there : 0;
  const int64_t* words = op.mask + (b * op.nodes + n) * op.words;
  const int shift = int(first & 63);
  if (first < 0) return there & (~(~0ull << -first) | uint64_t(words[0]) << -first);
  uint64_t bits = uint64_t(words[word]) >> shift;
  if (shift && word + 1 < op.words) bits |= uint64_t(words[word + 1]) << (64 - shift);
  return there & bits;
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

// The tile of queries of key head h that starts at row `first` of [nodes, group].
template <class T>
inline __attribute__((always_inline)) void load_queries(const TreeAttention& op, int64_t b, int64_t h, int64_t padded,
                                                        Queries& q) {
  const int64_t group = op.heads / op.kv_heads;
  q.across = q.rows >= kAcross;
  q.query.assign((q.across ? kRows : q.rows) * padded, 0.0f);
  q.sum.assign(kRows * padded, 0.0f);
  for (int r = 0; r < q.rows; ++r) {
    const int64_t n = (q.first + r) / group, head = h * group + (q.first + r) % group;
    const T* from = static_cast<const T*>(op.q) + b * op.q_batch + n * op.q_node + head * op.q_head;
    const float scale = op.scale * kLog2E;
    if (q.across)
      for (int64_t d = 0; d < op.width; ++d) q.query[d * kRows + r] = to_float(from[d]) * scale;
    else
      widen(from, &q.query[r * padded], op.width, scale);
  }
  std::fill_n(q.top, kRows, -kInf);
  std::fill_n(q.mass, kRows, 0.0f);
}

// Slots slot .. slot + count - 1; read where they lie if that gives what a copy gives.
template <class T>
inline __attribute__((always_inline)) Keys load_keys(const TreeAttention& op, int64_t b, int64_t h, int64_t slot,
                                                     int count, uint64_t any, Scratch& s) {
  const Plane<T> keys{static_cast<const T*>(op.k), op.k_batch, op.k_head, op.k_slot};
  const Plane<T> values{static_cast<const T*>(op.v), op.v_batch, op.v_head, op.v_slot};
  if constexpr (std::is_same_v<T, float>)
    if (any == ~0ull && s.padded == op.width && (!op.table || op.slots % kKeys == 0))
      return {keys.at(op, b, h, slot), values.at(op, b, h, slot), op.k_slot, op.v_slot, count};
  const Keys tile{s.key.data(), s.value.data(), s.padded, s.padded, count};
  for (int j = 0; j < tile.padded_count(); ++j) {
    // a slot that nobody sees may hold anything, NaN included, and its page id may be anything
    if (any >> j & 1) {
      widen(keys.at(op, b, h, slot + j), &s.key[j * s.padded], op.width, 1.0f);
      widen(values.at(op, b, h, slot + j), &s.value[j * s.padded], op.width, 1.0f);
    } else {
      std::fill_n(&s.key[j * s.padded], s.padded, 0.0f);
      std::fill_n(&s.value[j * s.padded], s.padded, 0.0f);
    }
  }
  return tile;
}

// Part `split` of the keys for all tiles of queries in the scratch.
template <class T>
BEAGLE_CLONES void attend(const TreeAttention& op, int64_t b, int64_t h, int64_t split, int64_t splits, Scratch& s) {
  for (Queries& q : s.tiles) load_queries<T>(op, b, h, s.padded, q);
  const int64_t group = op.heads / op.kv_heads, all = op.table ? op.slots * op.table_width : op.slots;
  const int64_t length = std::max<int64_t>(op.lengths[b], 0), end = std::min(all, length + 64 * op.words);
  const int64_t key_tiles = (end + kKeys - 1) / kKeys;
  for (int64_t i = key_tiles * split / splits; i < key_tiles * (split + 1) / splits; ++i) {
    const int64_t slot = i * kKeys;
    const int count = int(std::min<int64_t>(kKeys, end - slot));
    const bool whole = slot + kKeys <= length && count == kKeys;
    uint64_t seen[kMostTiles][kRows] = {}, any = whole ? ~0ull : 0;
    for (size_t t = 0; t < s.tiles.size(); ++t)
      for (int r = 0; r < s.tiles[t].rows; ++r) {
        const int64_t row = s.tiles[t].first + r;
        seen[t][r] = whole ? ~0ull : r && row % group ? seen[t][r - 1] : visible(op, b, row / group, slot, count);
        any |= seen[t][r];
      }
    if (!any) continue;
    const Keys keys = load_keys<T>(op, b, h, slot, 64 - __builtin_clzll(any), any, s);
    for (size_t t = 0; t < s.tiles.size(); ++t) {
      Queries& q = s.tiles[t];
      if (!q.across)
        add_tile(q, s, seen[t], keys);
      else if (q.rows > kLanes)
        add_tile_across<kRows>(q, s, seen[t], whole, op.width, keys);
      else
        add_tile_across<kLanes>(q, s, seen[t], whole, op.width, keys);
    }
  }
}

// What splits of the keys leave of a row: its sum, top and mass.
struct Part {
  int64_t width;
  std::vector<float> rows;
  float* at(int64_t row) { return &rows[row * (width + 2)]; }
};

template <class T>
void store(const TreeAttention& op, int64_t b, int64_t h, int64_t row, const float* sum, float mass) {
  const int64_t group = op.heads / op.kv_heads;
  T* out = static_cast<T*>(op.out) + ((b * op.nodes + row / group) * op.heads + h * group + row % group) * op.width;
  const float inverse = mass != 0.0f ? 1.0f / mass : 0.0f;
  for (int64_t d = 0; d < op.width; ++d) out[d] = narrow<T>(sum[d] * inverse);
}

// A row's parts, `stride` rows apart, into the first and out.
template <class T>
void combine(const TreeAttention& op, int64_t b, int64_t h, int64_t row, int64_t splits, Part& part, int64_t stride) {
  const int64_t rows = op.nodes * (op.heads / op.kv_heads), base = (b * op.kv_heads + h) * rows + row;
  float top = -kInf, mass = 0.0f;
  for (int64_t i = 0; i < splits; ++i) top = std::max(top, part.at(base + i * stride)[op.width]);
  for (int64_t i = 0; i < splits; ++i) {
    float *from = part.at(base + i * stride), *to = part.at(base);
    const float weight = top == -kInf ? 0.0f : exp2_of(from[op.width] - top);
    mass += from[op.width + 1] * weight;
    for (int64_t d = 0; d < op.width; ++d) to[d] = (i ? to[d] : 0.0f) + from[d] * weight;
  }
  store<T>(op, b, h, row, part.at(base), mass);
}

// How the work is cut: tasks of `tiles` tiles of rows each, and parts of the keys.
struct Cut {
  int64_t tiles, tasks, splits;
};

Cut cut(const TreeAttention& op, int64_t rows, int64_t threads) {
  int64_t longest = 0;
  for (int64_t b = 0; b < op.batch; ++b) longest = std::max<int64_t>(longest, op.lengths[b]);
  const int64_t all = (rows + kRows - 1) / kRows, planes = op.batch * op.kv_heads;
  const int64_t chunks = (all + kMostTiles - 1) / kMostTiles;
  Cut cut{(all + chunks - 1) / chunks, chunks, 1};
  if (threads == 1) return cut;
  const int64_t wanted = (4 * threads + planes * chunks - 1) / (planes * chunks);
  cut.splits = std::max<int64_t>(1, std::min(wanted, longest / kLeastKeys));
  if (planes * chunks * cut.splits < 2 * threads) cut.tiles = 1, cut.tasks = all;
  return cut;
}

template <class T>
void run(const TreeAttention& op, int threads) {
  const int64_t padded = (op.width + kLanes - 1) / kLanes * kLanes;
  const int64_t rows = op.nodes * (op.heads / op.kv_heads), planes = op.batch * op.kv_heads;
  const Cut by = cut(op, rows, threads);
  Part part{op.width, std::vector<float>(by.splits > 1 ? by.splits * planes * rows * (op.width + 2) : 0)};
  parallel(planes * by.tasks * by.splits, threads, [&](int64_t task) {
    const int64_t split = task % by.splits, chunk = task / by.splits % by.tasks, plane = task / by.splits / by.tasks;
    const int64_t b = plane / op.kv_heads, h = plane % op.kv_heads, stop = (chunk + 1) * by.tiles * kRows;
    Scratch scratch(padded);
    for (int64_t first = chunk * by.tiles * kRows; first < std::min(rows, stop); first += kRows) {
      Queries& q = scratch.tiles.emplace_back();
      q.first = first, q.rows = int(std::min<int64_t>(kRows, rows - first));
    }
    attend<T>(op, b, h, split, by.splits, scratch);
    for (const Queries& q : scratch.tiles)
      for (int r = 0; r < q.rows; ++r) {
        const float* sum = &q.sum[r * padded];
        if (by.splits == 1) {
          store<T>(op, b, h, q.first + r, sum, q.mass[r]);
          continue;
        }
        float* to = part.at((split * planes + plane) * rows + q.first + r);
        std::copy_n(sum, op.width, to);
        to[op.width] = q.top[r], to[op.width + 1] = q.mass[r];
      }
  });
  if (by.splits == 1) return;
  parallel(planes, threads, [&](int64_t plane) {
    for (int64_t row = 0; row < rows; ++row)
      combine<T>(op, plane / op.kv_heads, plane % op.kv_heads, row, by.splits, part, planes * rows);
  });
}

}  // namespace

void tree_attention(const TreeAttention& op, int threads) {
  // below some 100,000 products a second thread costs more than it saves
  int64_t work = 0;
  for (int64_t b = 0; b < op.batch; ++b) work += std::max<int64_t>(op.lengths[b], 0) + op.nodes;
  work *= op.nodes * op.heads * op.width;
  if (work < 100000) threads = 1;
  switch (op.dtype) {
    case 0: return run<float>(op, threads);
    case 1: return run<Half>(op, threads);
    default: return run<BFloat>(op, threads);
  }
}

}  // namespace beagle::cpu
