// Perturbed argmax with filters over one row of logits, read once; the row is never sorted.
#pragma once

#include <math.h>

#include "ops.h"
#include "philox.h"

namespace beagle {

// A logit as sampling sees it: NaN is -inf, +inf the largest number.
BEAGLE_FN float tidy(float z) {
  z = z == z ? z : -kInf;
  return z > kMax ? kMax : z;
}

template <int N, class T>
BEAGLE_FN void load_full(const T* p, T (&raw)[N]) {
#if defined(__CUDA_ARCH__)
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    constexpr int kVectors = N * sizeof(T) / 16;
    BEAGLE_UNROLL
    for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(p)[i];
    return;
  }
#endif
  BEAGLE_UNROLL
  for (int i = 0; i < N; ++i) raw[i] = p[i];
}

// N tidied logits from i, -inf from end on; whether one was NaN.
template <int N, class T>
BEAGLE_FN bool load_tile(const T* row, int64_t i, int64_t end, float (&z)[N]) {
  alignas(64) T raw[N];
  int32_t nan = 0;
  if (i + N <= end) {
    load_full(row + i, raw);
    BEAGLE_UNROLL
    for (int j = 0; j < N; ++j) {
      const float x = to_float(raw[j]);
      nan |= x != x;
      z[j] = tidy(x);
    }
    return nan;
  }
  BEAGLE_UNROLL
  for (int j = 0; j < N; ++j) {
    const float x = i + j < end ? to_float(row[i + j]) : -kInf;
    nan |= x != x;
    z[j] = tidy(x);
  }
  return nan;
}

template <int N>
BEAGLE_FN float tile_max(const float (&z)[N]) {
  constexpr int kLanes = N < 16 ? N : 16;
  float m[kLanes];
  BEAGLE_UNROLL
  for (int l = 0; l < kLanes; ++l) m[l] = z[l];
  BEAGLE_UNROLL
  for (int j = kLanes; j < N; j += kLanes)
    for (int l = 0; l < kLanes; ++l) m[l] = z[j + l] > m[l] ? z[j + l] : m[l];
  BEAGLE_UNROLL
  for (int s = kLanes / 2; s > 0; s /= 2)
    for (int l = 0; l < s; ++l) m[l] = m[l + s] > m[l] ? m[l + s] : m[l];
  return m[0];
}

template <int N>
BEAGLE_FN float lane_sum(const float (&value)[N]) {
  constexpr int kLanes = N < 16 ? N : 16;
  float lane[kLanes] = {};
  BEAGLE_UNROLL
  for (int j = 0; j < N; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += value[j + l];
  float sum = 0.0f;
  BEAGLE_UNROLL
  for (int l = 0; l < kLanes; ++l) sum += lane[l];
  return sum;
}

// Key of the largest logit in [begin, end) by a plain scan.
template <class T>
BEAGLE_FN uint64_t scan_key(const T* row, int64_t begin, int64_t end, int32_t& status) {
  uint64_t key = 0;
  float best = -kInf;
  for (int64_t i = begin; i < end; ++i) {
    const float x = to_float(row[i]), z = tidy(x);
    if (x != x) status |= kStatusNan;
    if (z > best) best = z, key = make_key(z, uint32_t(i));
  }
  return key;
}

// Key of the largest logit in [begin, end), 0 if none is above -inf; status takes kStatusNan.
template <class Team, class T>
BEAGLE_FN uint64_t top_key(Team& team, const T* row, int64_t begin, int64_t end, int32_t& status) {
  constexpr int kTile = Team::kTile;
  alignas(64) float z[kTile];
  float best = -kInf;
  int64_t where = begin;
  bool nan = false;
  for (int64_t i = begin + team.rank() * kTile; i < end; i += int64_t(team.size()) * kTile) {
    nan |= load_tile(row, i, end, z);
    const float m = tile_max(z);
    if (m > best) best = m, where = i;
  }
  uint64_t key = 0;
  if (best > -kInf) {
    load_tile(row, where, end, z);
    uint32_t first = 0;
    for (int j = kTile - 1; j >= 0; --j) first = z[j] == best ? uint32_t(j) : first;
    key = make_key(best, uint32_t(where) + first);
  }
  if (team.any(nan)) status |= kStatusNan;
  return team.max(key);
}

#if !defined(__CUDACC__)
using Floats = float __attribute__((vector_size(64), aligned(4)));
using Ints = int32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(32), aligned(2)));

BEAGLE_FN Ints widen(const void* p) {
  return __builtin_convertvector(*static_cast<const Shorts*>(p), Ints);
}
BEAGLE_FN void load_lanes(const float* p, Floats& z) { z = *reinterpret_cast<const Floats*>(p); }
BEAGLE_FN void load_lanes(const BFloat* p, Floats& z) { z = reinterpret_cast<Floats>(widen(p) << 16); }
BEAGLE_FN void load_lanes(const Half* p, Floats& z) {
  const Ints bits = widen(p), special = (bits & 0x7c00) == 0x7c00;
  const Floats magnitude = reinterpret_cast<Floats>((bits & 0x7fff) << 13) * 0x1p112f;
  z = reinterpret_cast<Floats>(reinterpret_cast<Ints>(magnitude) | (special & 0x7f800000) | (bits & 0x8000) << 16);
}

// The same by vectors: lane l keeps the largest of its tokens and the first tile that held it.
template <class T>
BEAGLE_FN uint64_t top_key(Thread&, const T* row, int64_t begin, int64_t end, int32_t& status) {
  constexpr int kLanes = 16, kVectors = 16, kStep = kLanes * kVectors;
  const int64_t whole = begin + (end - begin) / kStep * kStep;
  Floats best = Floats{} - kInf;
  Ints where = Ints{}, nan = Ints{};
  int32_t tile = 0;
  for (int64_t i = begin; i < whole; i += kStep, ++tile) {
    Floats m = Floats{} - kInf;
    for (int v = 0; v < kVectors; ++v) {
      Floats z;
      load_lanes(row + i + v * kLanes, z);
      __builtin_prefetch(row + i + v * kLanes + 4 * kStep, 0, 0);
      nan |= z != z;
      m = z > m ? z : m;
    }
    where = m > best ? Ints{} + tile : where;
    best = m > best ? m : best;
  }
  float top = -kInf;
  int32_t first = 0, bad = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (best[l] > top || (best[l] == top && where[l] < first)) top = best[l], first = where[l];
    bad |= nan[l];
  }
  if (bad) status |= kStatusNan;
  // an infinite one counts as kMax, which an earlier token may hold
  if (top > kMax) return scan_key(row, begin, end, status);
  uint64_t key = 0;
  if (top > -kInf) {
    int64_t i = begin + int64_t(first) * kStep;
    while (i < whole && to_float(row[i]) != top) ++i;
    key = make_key(top, uint32_t(i));
  }
  return whole < end ? most(key, scan_key(row, whole, end, status)) : key;
}
#endif

// Scratch of threshold(): 2^kRadix bins, then what the finder tells the team.
constexpr int kRadix = 11;
constexpr int kBins = 1 << kRadix;
struct Scratch { uint64_t bins[kBins + 2]; };

// The largest bin whose sum from the top reaches `need`; `above` gains the sum of the bins over it.
template <class Team>
BEAGLE_FN uint32_t find_from_top(Team& team, uint64_t* bins, int count, uint64_t need, uint64_t& above) {
  const int per = (count + team.size() - 1) / team.size();
  const int first = count - 1 - team.rank() * per, last = first - per < -1 ? -1 : first - per;
  uint64_t own = 0;
  for (int b = first; b > last; --b) own += bins[b];
  uint64_t sum = team.scan(own);
  if (sum < need && need <= sum + own) {
    int b = first;
    while (sum + bins[b] < need) sum += bins[b--];
    bins[count] = uint64_t(b), bins[count + 1] = sum;
  }
  team.sync();
  above += bins[count + 1];
  const uint32_t found = uint32_t(bins[count]);
  team.sync();
  return found;
}

// The least key t such that items with key > t weigh less than limit, by radix descent; limit is 1 to the total weight.
// item.load(i, key) gives the keys of a tile, item.weigh(i, key, weight) their weights, 0 beyond the end.
template <class Team, class Item>
BEAGLE_FN uint32_t threshold(Team& team, int64_t n, const Item& item, uint64_t limit, Scratch& scratch) {
  constexpr int kTile = Team::kTile;
  alignas(64) uint32_t key[kTile], weight[kTile];
  // few items: clearing and searching bins would cost more than passes over them
  const int radix = n < 4096 ? 6 : kRadix;
  uint32_t prefix = 0;
  uint64_t above = 0;
  for (int shift = 32; shift > 0;) {
    const int bits = least(radix, shift), count = 1 << bits;
    // keys of the range found so far: their distance from its first is below its width
    const uint32_t first = shift < 32 ? prefix << shift : 0, width = shift < 32 ? (1u << shift) - 1 : ~0u;
    shift -= bits;
    for (int b = team.rank(); b < count; b += team.size()) scratch.bins[b] = 0;
    team.sync();
    for (int64_t i = team.rank() * kTile; i < n; i += int64_t(team.size()) * kTile) {
      item.load(i, key);
      uint32_t alive = 0;
      for (int j = 0; j < kTile; ++j) alive |= uint32_t(key[j] - first <= width);
      if (!alive) continue;
      item.weigh(i, key, weight);
      for (int j = 0; j < kTile; ++j) {
        if (key[j] - first <= width) team.add(&scratch.bins[(key[j] - first) >> shift], uint64_t(weight[j]));
      }
    }
    team.sync();
    prefix = prefix << bits | find_from_top(team, scratch.bins, count, limit - above, above);
  }
  return prefix;
}

template <class T>
struct CountItem {
  const T* row;
  int64_t count;
  template <int N>
  BEAGLE_FN void load(int64_t i, uint32_t (&key)[N]) const {
    alignas(64) float z[N];
    load_tile(row, i, count, z);
    BEAGLE_UNROLL
    for (int j = 0; j < N; ++j) key[j] = order(z[j]);
  }
  template <int N>
  BEAGLE_FN void weigh(int64_t i, const uint32_t (&)[N], uint32_t (&weight)[N]) const {
    BEAGLE_UNROLL
    for (int j = 0; j < N; ++j) weight[j] = i + j < count;
  }
};

template <class T>
struct MassItem : CountItem<T> {
  uint32_t cut;
  float top, temperature;
  BEAGLE_FN MassItem(const T* row, int64_t count, uint32_t cut, float top, float temperature)
      : CountItem<T>{row, count}, cut(cut), top(top), temperature(temperature) {}
  template <int N>
  BEAGLE_FN void weigh(int64_t i, const uint32_t (&key)[N], uint32_t (&weight)[N]) const {
    const int32_t room = int32_t(least<int64_t>(this->count - i, N));
    BEAGLE_UNROLL
    for (int j = 0; j < N; ++j) {
      const uint32_t mass = exp_fixed((unorder(key[j]) - top) / temperature);
      weight[j] = mass & -uint32_t(key[j] >= cut) & -uint32_t(j < room);
    }
  }
  template <class Team>
  BEAGLE_FN uint64_t total(Team& team) const {
    constexpr int kTile = Team::kTile;
    alignas(64) uint32_t key[kTile], weight[kTile];
    uint64_t sum = 0;
    for (int64_t i = team.rank() * kTile; i < this->count; i += int64_t(team.size()) * kTile) {
      this->load(i, key);
      weigh(i, key, weight);
      BEAGLE_UNROLL
      for (int j = 0; j < kTile; ++j) sum += weight[j];
    }
    return team.sum(sum);
  }
};

// The least logit that top-k, then top-p, then min-p keep. top is the row's largest, above -inf.
template <class Team, class T>
BEAGLE_FN float filter_cut(Team& team, const T* row, int64_t vocab, const Knobs& knobs, float top, Scratch& scratch) {
  uint32_t cut = 0;
  if (knobs.top_k > 0 && knobs.top_k < vocab) {
    cut = threshold(team, vocab, CountItem<T>{row, vocab}, uint64_t(knobs.top_k), scratch);
  }
  if (knobs.top_p < 1.0f) {
    const MassItem<T> mass(row, vocab, cut, top, knobs.temperature);
    const uint64_t limit = uint64_t(ceil(double(knobs.top_p) * double(mass.total(team))));
    cut = most(cut, threshold(team, vocab, mass, most<uint64_t>(limit, 1), scratch));
  }
  if (knobs.min_p > 0.0f) {
    const float floor = float(log(double(knobs.min_p)));
    uint32_t inverse = 0;
    constexpr int kTile = Team::kTile;
    alignas(64) float z[kTile];
    for (int64_t i = team.rank() * kTile; i < vocab; i += int64_t(team.size()) * kTile) {
      load_tile(row, i, vocab, z);
      BEAGLE_UNROLL
      for (int j = 0; j < kTile; ++j) {
        const uint32_t below = ~order(z[j]);
        inverse = most(inverse, below & -uint32_t((z[j] - top) / knobs.temperature >= floor));
      }
    }
    cut = most(cut, ~uint32_t(team.max(uint64_t(inverse))));
  }
  return cut == 0 ? -kInf : unorder(cut);
}

// Offers every token of [begin, end) whose score can beat `best` to `score(token, z, noise)`, which returns a key or 0.
// `bound(z)` is at least score - scale x noise for every token whose logit is at most z.
template <class Team, class T, class Bound, class Score>
BEAGLE_FN uint64_t noisy_argmax(Team& team, const T* row, int64_t begin, int64_t end, const Stream& stream, float scale,
                                uint64_t best, const Bound& bound, const Score& score) {
  constexpr int kTile = Team::kTile, kGroups = kTile / 4;
  alignas(64) float z[kTile];
  alignas(64) uint32_t x[4][kGroups];
  for (int64_t i = begin + team.rank() * kTile; i < end; i += int64_t(team.size()) * kTile) {
    load_tile(row, i, end, z);
    const float roof = bound(tile_max(z)), leader = best ? key_value(best) : -kInf;
    if (!(roof + scale * kGumbelMax >= leader)) continue;
    philox<kGroups>(stream, uint32_t(i / 4), x);
    // half a thousandth below the exact difference covers the rounding of z + T g at any magnitude that matters
    const float slack = 1e-6f * (fabsf(leader) + fabsf(roof));
    const uint32_t limit = leader > -kInf ? word_limit((leader - roof - slack) / scale - 5e-4f) : 0xffffffffu;
    uint32_t alive = 0;
    BEAGLE_UNROLL
    for (int w = 0; w < 4; ++w) {
#if !defined(__CUDACC__)
#pragma GCC ivdep
#endif
      for (int j = 0; j < kGroups; ++j) alive |= uint32_t(x[w][j] <= limit);
    }
    if (!alive) continue;
    for (int j = 0; j < kTile; ++j) {
      const uint32_t word = x[j % 4][j / 4];
      if (word <= limit && z[j] > -kInf) best = most(best, score(i + j, z[j], word));
    }
  }
  return team.max(best);
}

struct LinearBound {
  BEAGLE_FN float operator()(float z) const { return z; }
};

struct PerturbedScore {
  float temperature, cut;
  BEAGLE_FN uint64_t operator()(int64_t token, float z, uint32_t word) const {
    return z >= cut ? make_key(z + temperature * gumbel(word), uint32_t(token)) : 0;
  }
};

// A row's part [begin, end) of choose_tokens: the best key, 0 if no token is above -inf.
template <class Team, class T>
BEAGLE_FN uint64_t choose(Team& team, const T* row, int64_t begin, int64_t end, const Knobs& knobs, float cut,
                          const Stream& stream, int32_t& status) {
  const uint64_t top = top_key(team, row, begin, end, status);
  if (!knobs.noisy() || top == 0) return top;
  const PerturbedScore score{knobs.temperature, cut};
  const uint64_t start = score(key_index(top), key_value(top), philox_word(stream, key_index(top)));
  return noisy_argmax(team, row, begin, end, stream, knobs.temperature, start, LinearBound{}, score);
}

// Chunk `chunk` of `chunks` of a row. A row with filters needs its cut before anything else, so chunk 0 takes it whole.
template <class Team, class T>
BEAGLE_FN uint64_t choose_chunk(Team& team, const T* row, int64_t vocab, int64_t chunk, int64_t chunks,
                                const Knobs& knobs, const Stream& stream, int32_t& status, Scratch& scratch) {
  const bool filters = knobs.filters(vocab);
  if (filters && chunk > 0) return 0;
  const int64_t tokens = filters ? vocab : ((vocab + chunks - 1) / chunks + 63) / 64 * 64;
  const int64_t begin = chunk * tokens, end = least(begin + tokens, vocab);
  if (begin >= end) return 0;
  float cut = -kInf;
  if (filters) {
    int32_t ignored = 0;
    const uint64_t top = top_key(team, row, 0, vocab, ignored);
    if (top != 0) cut = filter_cut(team, row, vocab, knobs, key_value(top), scratch);
  }
  return choose(team, row, begin, end, knobs, cut, stream, status);
}

// The row's token from its chunks' keys; status gains their flags.
BEAGLE_FN int64_t finish_choice(const uint64_t* keys, const int32_t* flags, int64_t chunks, int32_t& status) {
  uint64_t best = 0;
  for (int64_t c = 0; c < chunks; ++c) best = most(best, keys[c]), status |= flags[c];
  if (best == 0) status |= kStatusNoFinite;
  return best == 0 ? 0 : int64_t(key_index(best));
}

}  // namespace beagle
