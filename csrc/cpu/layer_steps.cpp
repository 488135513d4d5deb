#include "layer_steps.h"

#include <type_traits>

#include "exponential.h"
#include "lanes.h"

#ifndef BEAGLE_ISA
#define BEAGLE_ISA baseline
#endif

namespace beagle::cpu::BEAGLE_ISA {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kBlock = 64;  // positions whose values are summed before they join the rest
using Vec = Floats<kLanes>;

BEAGLE_FN Vec& at(float* place) { return *reinterpret_cast<Vec*>(place); }
BEAGLE_FN const Vec& at(const float* place) { return *reinterpret_cast<const Vec*>(place); }
BEAGLE_FN int64_t whole(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

template <class T>
void widen(const void* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(static_cast<const T*>(from)[i]);
}

template <class T>
void narrow_all(const float* from, int64_t count, void* to) {
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = narrow<T>(from[i]);
}

template <class T>
void norm(const float* from, const NormWeight& norm, int64_t width, float* to) {
  if (!norm.weight) {
    for (int64_t d = 0; d < width; ++d) to[d] = from[d];
    return;
  }
  Vec squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
    for (int v = 0; v < 4; ++v) squares[v] += at(from + i + v * kLanes) * at(from + i + v * kLanes);
  squares[0] = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  add_lanes<kLanes, 1>(squares);
  float sum = squares[0][0];
  for (; i < width; ++i) sum += from[i] * from[i];
  const float inverse = 1.0f / __builtin_sqrtf(sum / float(width) + norm.eps);
  const T* weight = static_cast<const T*>(norm.weight);
  for (int64_t d = 0; d < width; ++d) to[d] = from[d] * inverse * (to_float(weight[d]) + norm.added);
}

template <class T>
void rotate(float* head, const void* cos, const void* sin, int64_t rotary) {
  const T *c = static_cast<const T*>(cos), *s = static_cast<const T*>(sin);
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * to_float(c[i]) - b * to_float(s[i]);
    head[half + i] = b * to_float(c[half + i]) + a * to_float(s[half + i]);
  }
}

void gate(float* gate, const float* up, int64_t count, int32_t activation) {
  if (activation == kSilu) {
    for (int64_t i = 0; i < count; ++i) {
      const float x = gate[i], e = exp2_of((x < 0.0f ? x : -x) * kLog2E);
      gate[i] = x * (x < 0.0f ? e : 1.0f) / (1.0f + e) * up[i];
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const float x = gate[i];
    gate[i] = 0.5f * x * (1.0f + tanh_of(0.7978845608f * (x + 0.044715f * x * x * x))) * up[i];
  }
}

// Scores of 16 keys for one query row.
BEAGLE_FN Vec dots(const float* query, const float* const* key, int64_t padded) {
  Vec sum[kLanes] = {};
  // as many keys at a time as there are registers for their addresses
#pragma GCC unroll 2
  for (int first = 0; first < kLanes; first += 8) {
    const float* row[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) row[j] = key[first + j];
    for (int64_t d = 0; d < padded; d += kLanes) {
      const Vec q = at(query + d);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sum[first + j] += q * at(row[j] + d);
    }
  }
  add_lanes<kLanes, kLanes>(sum);
  return sum[0];
}

// Some rows' attention to the keys of one head.
template <class T>
struct Attention {
  const DecoderLayer& op;
  const int64_t b, h, first, count;
  const int64_t padded = whole(op.head_width), group = op.heads / op.kv_heads;
  const int64_t length = most<int64_t>(op.lengths[b], 0);
  int64_t begin = 0, stop = 0, behind = 0;  // slots begin .. stop - 1 of the text, and as many behind its length
  int64_t stride = 0;                       // floats between rows of scores: first those of the text, then those behind
  float *query, *wide, *sum, *total, *score;
  float mass[kQueries] = {}, part[kQueries] = {};  // of the weights, summed as the values are

  Attention(const DecoderLayer& op, int64_t b, int64_t h, int64_t first, int64_t count, float* room)
      : op(op), b(b), h(h), first(first), count(count) {
    const int64_t all = op.table ? op.slots * op.table_width : op.slots;
    stop = least<int64_t>(length, all), begin = op.starts ? stop : 0;
    for (int64_t r = 0; r < count; ++r) {
      begin = least<int64_t>(begin, start(r));
      for (int64_t w = 0; w < op.words; ++w)
        if (const uint64_t bits = word(r, w)) behind = most<int64_t>(behind, 64 * w + 64 - __builtin_clzll(bits));
    }
    behind = least<int64_t>(behind, all - stop);
    begin = begin / kBlock * kBlock;
    stride = whole(stop - begin) + whole(behind);
    query = room, sum = query + kQueries * padded, total = sum + kQueries * padded, wide = total + kQueries * padded;
    score = wide + kBlock * padded;
  }

  int64_t node(int64_t r) const { return (first + r) / group; }
  int64_t head(int64_t r) const { return h * group + (first + r) % group; }
  int64_t start(int64_t r) const { return op.starts ? most<int64_t>(op.starts[b * op.nodes + node(r)], 0) : 0; }
  uint64_t word(int64_t r, int64_t w) const { return uint64_t(op.mask[(b * op.nodes + node(r)) * op.words + w]); }
  float* behind_of(int64_t r) const { return score + r * stride + whole(stop - begin); }

  // The rows of a plane in slots slot .. slot + n - 1, by pointers of which there are `fill` at least; copied where they
  // are not whole vectors of fp32.
  void rows(const CachePlane& plane, int64_t slot, int64_t n, int fill, const float** at_row) const {
    for (int64_t j = 0; j < n; ++j) {
      const T* from = slot_at<T>(op, plane, b, h, slot + j);
      if constexpr (std::is_same_v<T, float>)
        if (padded == op.head_width) {
          at_row[j] = from;
          continue;
        }
      float* to = wide + j * padded;
      for (int64_t d = 0; d < op.head_width; ++d) to[d] = to_float(from[d]);
      for (int64_t d = op.head_width; d < padded; ++d) to[d] = 0.0f;
      at_row[j] = to;
    }
    for (int64_t j = n; j < fill; ++j) at_row[j] = at_row[0];
  }

  void load_queries(const float* q, int64_t q_stride) {
    const float scale = op.softcap > 0.0f ? op.scale : op.scale * kLog2E;
    for (int64_t r = 0; r < count; ++r) {
      const float* from = q + (b * op.nodes + node(r)) * q_stride + head(r) * op.head_width;
      for (int64_t d = 0; d < padded; ++d) query[r * padded + d] = d < op.head_width ? from[d] * scale : 0.0f;
    }
  }

  // Scores of n slots from `slot` on into place `to` of each row's.
  void score_slots(int64_t slot, int64_t n, float* to) {
    const float* key[kLanes];
    for (int64_t j = 0; j < n; j += kLanes, to += kLanes) {
      rows(op.keys, slot + j, least<int64_t>(kLanes, n - j), kLanes, key);
      for (int64_t r = 0; r < count; ++r) at(to + r * stride) = dots(query + r * padded, key, padded);
    }
  }

  // Row r's scores become 2^(score - top), 0 where it does not see.
  void weigh(int64_t r) {
    float *text = score + r * stride, *tail = behind_of(r), top = -kInf;
    const int64_t texts = whole(stop - begin), tails = whole(behind);
    if (op.softcap > 0.0f) {
      const float inverse = 1.0f / op.softcap, cap = op.softcap * kLog2E;
      for (int64_t i = 0; i < texts + tails; i += kLanes)
        for (int j = 0; j < kLanes; ++j) text[i + j] = cap * tanh_of(text[i + j] * inverse);
    }
    for (int64_t i = 0; i < least<int64_t>(start(r) - begin, texts); ++i) text[i] = -kInf;
    for (int64_t i = stop - begin; i < texts; ++i) text[i] = -kInf;
    for (int64_t i = 0; i < tails; ++i)
      if (i >= behind || length + i < start(r) || !(word(r, i / 64) >> (i % 64) & 1)) tail[i] = -kInf;
    float tops[kLanes];
    for (int j = 0; j < kLanes; ++j) tops[j] = -kInf;
    for (int64_t i = 0; i < texts + tails; i += kLanes)
      for (int j = 0; j < kLanes; ++j) tops[j] = text[i + j] > tops[j] ? text[i + j] : tops[j];
    for (int j = 0; j < kLanes; ++j) top = tops[j] > top ? tops[j] : top;
    const float pivot = top == -kInf ? 0.0f : top;
    for (int64_t i = 0; i < texts + tails; i += kLanes)
      for (int j = 0; j < kLanes; ++j) text[i + j] = exp2_of(text[i + j] - pivot);
  }

  // sum += weights * values over n slots of the text, for kRows rows and 16 kVecs numbers of each.
  template <int kRows, int kVecs>
  void add_values(int64_t r, int64_t d, const float* weight, const float* const* value, int64_t n) {
    Vec part[kRows][kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) part[i][v] = at(sum + (r + i) * padded + d + v * kLanes);
    for (int64_t j = 0; j < n; ++j) {
      Vec row[kVecs];
      const float* from = value[j] + d;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) row[v] = at(from + v * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) part[i][v] += weight[i * stride + j] * row[v];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) at(sum + (r + i) * padded + d + v * kLanes) = part[i][v];
  }

  template <int kRows>
  void add_rows(int64_t r, const float* weight, const float* const* value, int64_t n) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= padded; d += 4 * kLanes) add_values<kRows, 4>(r, d, weight, value, n);
    for (; d < padded; d += kLanes) add_values<kRows, 1>(r, d, weight, value, n);
  }

  // A block's sums of row r join its total.
  void close_block(int64_t r) {
    mass[r] += part[r], part[r] = 0.0f;
    for (int64_t d = 0; d < padded; ++d) total[r * padded + d] += sum[r * padded + d], sum[r * padded + d] = 0.0f;
  }

  // The text's values, block by block of positions; what is left of the last one stays in `sum`. A row's values before
  // its start are left out: a weight of 0 does not keep a NaN there away.
  void add_text() {
    const float* value[kBlock];
    int64_t latest = begin;
    for (int64_t r = 0; r < count; ++r) latest = most<int64_t>(latest, start(r));
    for (int64_t slot = begin; slot < stop; slot += kBlock) {
      const int64_t n = least<int64_t>(kBlock, stop - slot);
      rows(op.values, slot, n, 0, value);
      int64_t r = 0;
      const float* weight = score + slot - begin;
      for (; slot >= latest && r + 4 <= count; r += 4) add_rows<4>(r, weight + r * stride, value, n);
      for (; r < count; ++r) {
        const int64_t unseen = least<int64_t>(most<int64_t>(start(r) - slot, 0), n);
        add_rows<1>(r, weight + r * stride + unseen, value + unseen, n - unseen);
      }
      // several rows at a time: one alone would wait for each of its sums
      for (r = 0; r < count; r += 8)
        for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 8
          for (int64_t i = r; i < r + 8; ++i) part[i] += weight[i * stride + j];
      for (r = 0; n == kBlock && r < count; ++r) close_block(r);
    }
  }

  // The values behind the text that row r sees, at the positions that follow, or that follow its start where that lies
  // behind the text too.
  void add_behind(int64_t r) {
    const float *tail = behind_of(r), *value[1];
    int64_t position = most<int64_t>(stop, start(r));
    for (int64_t i = 0; i < behind; ++i) {
      if (length + i < start(r) || !(word(r, i / 64) >> (i % 64) & 1)) continue;
      rows(op.values, length + i, 1, 1, value);
      add_rows<1>(r, tail + i, value, 1);
      part[r] += tail[i];
      if (++position % kBlock == 0) close_block(r);
    }
    close_block(r);
  }

  void run(const float* q, int64_t q_stride, float* out, int64_t out_stride) {
    load_queries(q, q_stride);
    for (int64_t i = 0; i < 2 * kQueries * padded; ++i) sum[i] = 0.0f;
    score_slots(begin, stop - begin, score);
    score_slots(length, behind, score + whole(stop - begin));
    for (int64_t r = 0; r < count; ++r) weigh(r);
    add_text();
    for (int64_t r = 0; r < count; ++r) {
      add_behind(r);
      const float inverse = mass[r] != 0.0f ? 1.0f / mass[r] : 0.0f;
      float* to = out + (b * op.nodes + node(r)) * out_stride + head(r) * op.head_width;
      for (int64_t d = 0; d < op.head_width; ++d) to[d] = total[r * padded + d] * inverse;
    }
  }
};

template <class T>
void attend(const DecoderLayer& op, int64_t b, int64_t h, int64_t first, int64_t count, const float* q, int64_t q_stride,
            float* out, int64_t out_stride, float* room) {
  Attention<T>(op, b, h, first, count, room).run(q, q_stride, out, out_stride);
}

}  // namespace

extern const LayerSteps kLayerSteps;
const LayerSteps kLayerSteps = {{norm<float>, norm<Half>, norm<BFloat>},
                                {widen<float>, widen<Half>, widen<BFloat>},
                                {narrow_all<float>, narrow_all<Half>, narrow_all<BFloat>},
                                {rotate<float>, rotate<Half>, rotate<BFloat>},
                                gate,
                                {attend<float>, attend<Half>, attend<BFloat>}};

}  // namespace beagle::cpu::BEAGLE_ISA
