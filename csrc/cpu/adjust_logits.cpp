// A row's text is counted once; then each node, or a part of one, is a pass over its columns, and the few tokens of the
// text and the path one by one.
#include "../core/adjust.h"

#include <vector>

#include "executor.h"
#include "pool.h"

namespace beagle::cpu {
namespace {

struct Plain {
  template <class T>
  BEAGLE_FN T add(T* p, T x) const { return (*p += x) - x; }
  BEAGLE_FN uint32_t set(uint32_t* p, uint32_t bits) const {
    const uint32_t before = *p;
    *p |= bits;
    return before;
  }
};

constexpr int64_t kTile = 1024;  // that stay in the first cache from loop to loop

template <class T>
BEAGLE_FN void copy_tile(const AdjustedNode& node, int64_t begin, int64_t end) {
  const AdjustLogits& op = node.row.op;
  const int64_t table = node.row.b * op.vocab;
  const T* logits = node.logits<T>();
  float* out = node.out();
  if (node.row.gathers()) {
    for (int64_t i = begin; i < end; ++i) out[i] = node.plain<T>(i);
    return;
  }
  if (op.added) {
    const float* added = op.added + table;
    for (int64_t i = begin; i < end; ++i) out[i] = to_float(logits[i]) + added[i];
  } else {
    for (int64_t i = begin; i < end; ++i) out[i] = to_float(logits[i]);
  }
  if (op.first) {
    const int32_t *first = op.first + table, number = node.number();
    for (int64_t i = begin; i < end; ++i) out[i] = number < first[i] ? -kInf : out[i];
  }
  if (op.allowed) {
    for (int64_t i = begin; i < end; i += 32) {
      const uint32_t bits = uint32_t(node.words()[i / 32]);
      const int32_t count = int32_t(least<int64_t>(end - i, 32));
      if (bits != ~0u)
        for (int32_t j = 0; j < count; ++j) out[i + j] = bits >> j & 1 ? out[i + j] : -kInf;
    }
  }
}

template <class T>
BEAGLE_FN void adjust_part(const AdjustedRow& row, int64_t n, int64_t begin, int64_t end) {
  Thread team;
  const AdjustedNode node(team, row, n);
  for (int64_t i = begin; i < end; i += kTile) copy_tile<T>(node, i, least(i + kTile, end));
  adjust_tokens<T>(team, node, begin, end);
}

BEAGLE_CLONES void adjust_floats(const AdjustedRow& row, int64_t n, int64_t begin, int64_t end) {
  adjust_part<float>(row, n, begin, end);
}
BEAGLE_CLONES void adjust_halves(const AdjustedRow& row, int64_t n, int64_t begin, int64_t end) {
  adjust_part<Half>(row, n, begin, end);
}
BEAGLE_CLONES void adjust_bfloats(const AdjustedRow& row, int64_t n, int64_t begin, int64_t end) {
  adjust_part<BFloat>(row, n, begin, end);
}
constexpr decltype(&adjust_floats) kAdjust[kDtypes] = {adjust_floats, adjust_halves, adjust_bfloats};

// A table that is all zero between calls: clearing what a text has set costs less than clearing a vocabulary.
uint32_t* counts_of(int64_t width) {
  thread_local std::vector<uint32_t> table;
  if (int64_t(table.size()) < width) table.assign(size_t(width), 0);
  return table.data();
}

void adjust_row(const AdjustLogits& op, int64_t b, int threads) {
  const AdjustedRow row(op, b, counts_of(op.width));
  op.sizes[b] = 0;
  const int64_t positions = row.penalises() ? op.slots + op.nodes * op.path_length : 0;
  for (int64_t i = 0; i < positions; ++i) note_token(row, i, Plain{});
  parallel(op.nodes * op.chunks, threads, [&](int64_t task) {
    const int64_t begin = task % op.chunks * part_columns(op), end = least(begin + part_columns(op), op.width);
    if (begin < end) kAdjust[op.dtype](row, task / op.chunks, begin, end);
  });
  for (int32_t i = 0; i < op.sizes[b]; ++i) row.counts[row.listed()[i]] = 0;
}

}  // namespace

void adjust_logits(const AdjustLogits& op, int threads) {
  if (op.batch >= threads) {
    parallel(op.batch, threads, [&](int64_t b) { adjust_row(op, b, 1); });
    return;
  }
  for (int64_t b = 0; b < op.batch; ++b) adjust_row(op, b, threads);
}

}  // namespace beagle::cpu
