// Attention of tree nodes to a ragged cache: each key is read once for all nodes and the query heads that share it.
#include "../core/common.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "attention_cache.h"
#include "attention_exact.h"
#include "attention_tile.h"
#include "executor.h"
#include "lanes.h"
#include "pool.h"

namespace beagle::cpu {
namespace {

// Tiles of rows that one task takes through each tile of keys; keys below which a further split costs more than it saves.
constexpr int64_t kMostTiles = 8, kLeastKeys = 256;

// The tile of queries of key head h that starts at row `first` of [nodes, group].
template <class T>
inline __attribute__((always_inline)) void load_queries(const TreeAttention& op, int64_t b, int64_t h, int64_t padded,
                                                        int64_t value_padded, Queries& q) {
  const int64_t group = op.heads / op.kv_heads;
  q.across = q.rows >= kAcross;
  q.query.assign((q.across ? kRows : q.rows) * padded, 0.0f);
  q.sum.assign(kRows * value_padded, 0.0f);
  for (int r = 0; r < q.rows; ++r) {
    const int64_t n = (q.first + r) / group, head = h * group + (q.first + r) % group;
    const T* from = static_cast<const T*>(op.q) + b * op.q_batch + n * op.q_node + head * op.q_head;
    // a soft cap takes scores as they are, and gives them in powers of two
    const float scale = op.softcap > 0.0f ? op.scale : op.scale * kLog2E;
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
    if (any == ~0ull && s.padded == op.width && s.value_padded == op.value_width &&
        (!op.table || op.slots % kKeys == 0))
      return {keys.at(op, b, h, slot), values.at(op, b, h, slot), op.k_slot, op.v_slot, count};
  const Keys tile{s.key.data(), s.value.data(), s.padded, s.value_padded, count};
  for (int j = 0; j < tile.padded_count(); ++j) {
    // a slot that nobody sees may hold anything, NaN included, and its page id may be anything
    if (any >> j & 1) {
      widen(keys.at(op, b, h, slot + j), &s.key[j * s.padded], op.width, 1.0f);
      widen(values.at(op, b, h, slot + j), &s.value[j * s.value_padded], op.value_width, 1.0f);
    } else {
      std::fill_n(&s.key[j * s.padded], s.padded, 0.0f);
      std::fill_n(&s.value[j * s.value_padded], s.value_padded, 0.0f);
    }
  }
  return tile;
}

// Part `split` of the keys for all tiles of queries in the scratch.
template <class T, bool kCapped>
BEAGLE_CLONES void attend(const TreeAttention& op, int64_t b, int64_t h, int64_t split, int64_t splits, Scratch& s) {
  for (Queries& q : s.tiles) load_queries<T>(op, b, h, s.padded, s.value_padded, q);
  const Starts starts = starts_of(op, b);
  const int64_t group = op.heads / op.kv_heads, all = op.table ? op.slots * op.table_width : op.slots;
  const int64_t length = std::max<int64_t>(op.lengths[b], 0), end = std::min(all, length + 64 * op.words);
  const int64_t skipped = starts.first / kKeys, key_tiles = std::max<int64_t>((end + kKeys - 1) / kKeys - skipped, 0);
  const int64_t stop = skipped + key_tiles * (split + 1) / splits;
  for (int64_t i = skipped + key_tiles * split / splits; i < stop; ++i) {
    const int64_t slot = i * kKeys;
    const int count = int(std::min<int64_t>(kKeys, end - slot));
    const bool whole = slot >= starts.last && slot + kKeys <= length && count == kKeys;
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
        add_tile<kCapped>(q, s, seen[t], keys);
      else if (q.rows > kLanes)
        add_tile_across<kRows, kCapped>(q, s, seen[t], whole, op.width, keys);
      else
        add_tile_across<kLanes, kCapped>(q, s, seen[t], whole, op.width, keys);
    }
  }
}

// What splits of the keys leave of a row: its sum, top and mass.
struct Part {
  int64_t width;
  std::vector<float> rows;
  float* at(int64_t row) { return &rows[row * (width + 2)]; }
};

// A row's parts, `stride` rows apart, into the first and out.
template <class T>
void combine(const TreeAttention& op, int64_t b, int64_t h, int64_t row, int64_t splits, Part& part, int64_t stride) {
  const int64_t rows = op.nodes * (op.heads / op.kv_heads), base = (b * op.kv_heads + h) * rows + row;
  float top = -kInf, mass = 0.0f;
  for (int64_t i = 0; i < splits; ++i) top = std::max(top, part.at(base + i * stride)[op.value_width]);
  for (int64_t i = 0; i < splits; ++i) {
    float *from = part.at(base + i * stride), *to = part.at(base);
    const float weight = top == -kInf ? 0.0f : exp2_of(from[op.value_width] - top);
    mass += from[op.value_width + 1] * weight;
    for (int64_t d = 0; d < op.value_width; ++d) to[d] = (i ? to[d] : 0.0f) + from[d] * weight;
  }
  store<T>(op, b, h, row, 0, op.value_width, part.at(base), top, mass);
}

// How the work is cut: tasks of `tiles` tiles of rows each, and parts of the keys.
struct Cut {
  int64_t tiles, tasks, splits;
};

Cut cut(const TreeAttention& op, int64_t rows, int64_t longest, int64_t threads) {
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
void run(const TreeAttention& op, int64_t longest, int threads) {
  const auto padded = [](int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; };
  const Cap cap{op.softcap > 0.0f ? 1.0f / op.softcap : 0.0f, op.softcap * kLog2E};
  const int64_t rows = op.nodes * (op.heads / op.kv_heads), planes = op.batch * op.kv_heads;
  const Cut by = cut(op, rows, longest, threads);
  Part part{op.value_width, std::vector<float>(by.splits > 1 ? by.splits * planes * rows * (op.value_width + 2) : 0)};
  parallel(planes * by.tasks * by.splits, threads, [&](int64_t task) {
    const int64_t split = task % by.splits, chunk = task / by.splits % by.tasks, plane = task / by.splits / by.tasks;
    const int64_t b = plane / op.kv_heads, h = plane % op.kv_heads, stop = (chunk + 1) * by.tiles * kRows;
    Scratch scratch(padded(op.width), padded(op.value_width), cap);
    for (int64_t first = chunk * by.tiles * kRows; first < std::min(rows, stop); first += kRows) {
      Queries& q = scratch.tiles.emplace_back();
      q.first = first, q.rows = int(std::min<int64_t>(kRows, rows - first));
    }
    (op.softcap > 0.0f ? attend<T, true> : attend<T, false>)(op, b, h, split, by.splits, scratch);
    for (const Queries& q : scratch.tiles)
      for (int r = 0; r < q.rows; ++r) {
        const float* sum = &q.sum[r * scratch.value_padded];
        if (by.splits == 1) {
          store<T>(op, b, h, q.first + r, 0, op.value_width, sum, q.top[r], q.mass[r]);
          continue;
        }
        float* to = part.at((split * planes + plane) * rows + q.first + r);
        std::copy_n(sum, op.value_width, to);
        to[op.value_width] = q.top[r], to[op.value_width + 1] = q.mass[r];
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
  int64_t work = 0, longest = 0;
  for (int64_t b = 0; b < op.batch; ++b) {
    const int64_t keys = keys_seen(op, b);
    work += keys * op.nodes * op.heads * (op.width + op.value_width) / 2;
    longest = std::max(longest, keys);
  }
  if (work < 100000) threads = 1;
  if (op.nodes <= kFewNodes) return exact_attention(op, threads);
  switch (op.dtype) {
    case 0: return run<float>(op, longest, threads);
    case 1: return run<Half>(op, longest, threads);
    default: return run<BFloat>(op, longest, threads);
  }
}

}  // namespace beagle::cpu
