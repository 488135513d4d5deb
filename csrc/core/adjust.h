// What the text before a node does to its logits: what is looked up of a row, and what is done to the tokens of its text.
#pragma once

#include "ops.h"

namespace beagle {

// An entry of the table of counts: how often a token is among the new ones of the text, and whether it is in it at all.
constexpr uint32_t kSeen = 1u << 31;

// What row b has before any node, and its numbers.
struct AdjustedRow {
  const AdjustLogits& op;
  int64_t b, length, prompt;
  uint32_t* counts;  // [width], of the tokens listed
  float repetition, frequency, presence;
  int32_t ngram;

  BEAGLE_FN AdjustedRow(const AdjustLogits& op, int64_t b, uint32_t* counts)
      : op(op), b(b), length(within(op.lengths[b], op.slots)), prompt(within(op.prompts[b], length)), counts(counts),
        repetition(op.repetition[b]), frequency(op.frequency[b]), presence(op.presence[b]), ngram(op.ngram[b]) {}

  static BEAGLE_FN int64_t within(int64_t x, int64_t top) { return least(most<int64_t>(x, 0), top); }
  BEAGLE_FN const int64_t* text() const { return op.text + b * op.slots; }
  BEAGLE_FN int32_t* listed() const { return op.listed + b * op.slots; }
  BEAGLE_FN bool penalises() const { return repetition != 1.0f || frequency != 0.0f || presence != 0.0f; }

  // Whether the tables' entries of a column stand where its token says.
  BEAGLE_FN bool gathers() const { return op.token_ids && (op.added || op.first || op.allowed); }

  // The column of a token, -1 if it has none.
  BEAGLE_FN int32_t column(int64_t token) const {
    if (!op.token_ids) return token >= 0 && token < op.width ? int32_t(token) : -1;
    int64_t low = 0, high = op.width;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (op.token_ids[middle] < token) low = middle + 1;
      else high = middle;
    }
    return low < op.width && op.token_ids[low] == token ? int32_t(low) : -1;
  }
  BEAGLE_FN int64_t token(int64_t column) const { return op.token_ids ? op.token_ids[column] : column; }

  // z of a token that is in the text, c times among the new tokens. What is -inf stays: it may be banned already. No
  // branches: signs and counts are as good as random.
  BEAGLE_FN float penalised(float z, uint32_t c) const {
    const float times = z * repetition, over = z / repetition, repeated = z < 0.0f ? times : over;
    const float counted = repeated - frequency * float(c), less = counted - presence;
    const float all = c == 0 ? repeated : less;
    return z == -kInf ? z : all;
  }
};

// A node's prefix is the text and then the path, which begins at its first token.
struct AdjustedNode {
  const AdjustedRow& row;
  int64_t n, total;
  const int64_t* path;
  const int32_t* places;  // the columns of the path's tokens, the padding's -1

  template <class Team>
  BEAGLE_FN AdjustedNode(Team& team, const AdjustedRow& row, int64_t n) : row(row), n(n) {
    const AdjustLogits& op = row.op;
    const int64_t first = (row.b * op.nodes + n) * op.path_length;
    places = op.places + first;
    int64_t depth = 0;
    for (int64_t j = team.rank(); j < op.path_length; j += team.size())
      if (op.paths[first + j] >= 0) depth = most(depth, op.path_length - j);
    depth = int64_t(team.max(uint64_t(depth)));
    path = op.paths + first + op.path_length - depth, total = row.length + depth;
  }

  BEAGLE_FN int64_t at(int64_t i) const { return i < row.length ? row.text()[i] : path[i - row.length]; }
  // The number of the node's next token among the new ones.
  BEAGLE_FN int32_t number() const { return int32_t(least<int64_t>(total - row.prompt, INT32_MAX)); }
  BEAGLE_FN const int32_t* words() const { return row.op.allowed + (row.b * row.op.nodes + n) * row.op.words; }
  BEAGLE_FN float* out() const { return row.op.out + (row.b * row.op.nodes + n) * row.op.width; }
  template <class T>
  BEAGLE_FN const T* logits() const {
    return static_cast<const T*>(row.op.logits) + row_offset(row.b, n, row.op.stride_b, row.op.stride_n);
  }

  BEAGLE_FN float added(int64_t token) const {
    const AdjustLogits& op = row.op;
    return op.added ? op.added[row.b * op.vocab + row.within(token, op.vocab - 1)] : 0.0f;
  }
  // Whether a token comes too soon or is not allowed.
  BEAGLE_FN bool banned(int64_t token) const {
    const AdjustLogits& op = row.op;
    if (op.first && number() < op.first[row.b * op.vocab + row.within(token, op.vocab - 1)]) return true;
    const int64_t bit = row.within(token, 32 * op.words - 1);
    return op.allowed && !(words()[bit / 32] >> bit % 32 & 1);
  }
  // A column's value before n-grams and penalties, by itself and without phrases.
  template <class T>
  BEAGLE_FN float plain(int64_t column) const {
    const int64_t token = row.token(column);
    const float z = to_float(logits<T>()[column]);
    return banned(token) ? -kInf : row.op.added ? z + added(token) : z;
  }

  // How often a column is that of a token of the path.
  BEAGLE_FN uint32_t on_path(int32_t column) const {
    uint32_t count = 0;
    for (int64_t j = 0; j < row.op.path_length; ++j) count += places[j] == column;
    return count;
  }

  // Whether phrase k is this row's and the prefix ends as it begins.
  BEAGLE_FN bool matches(int64_t k) const {
    const AdjustLogits& op = row.op;
    if (op.phrase_rows[k] != -1 && op.phrase_rows[k] != row.b) return false;
    const int64_t* phrase = op.phrases + k * op.phrase_length;
    int64_t begin = 0;
    while (begin < op.phrase_length && phrase[begin] < 0) ++begin;
    const int64_t end = op.phrase_length - 1;
    if (begin > end || end - begin > total) return false;
    for (int64_t j = end - 1; j >= begin; --j)
      if (phrase[j] != at(total - end + j)) return false;
    return true;
  }
};

// Notes position i of the text or of the paths, as many as there are slots and places together; `memory` adds and sets
// bits, and tells what was there.
template <class Memory>
BEAGLE_FN void note_token(const AdjustedRow& row, int64_t i, const Memory& memory) {
  const AdjustLogits& op = row.op;
  const int64_t places = op.nodes * op.path_length;
  if (i >= op.slots) {
    const int64_t place = row.b * places + i - op.slots;
    op.places[place] = row.column(op.paths[place]);
    return;
  }
  const int32_t column = i < row.length ? row.column(row.text()[i]) : -1;
  if (column < 0) return;
  uint32_t* entry = row.counts + column;
  const uint32_t before = i < row.prompt ? memory.set(entry, kSeen) : memory.add(entry, 1u);
  if (before == 0) row.listed()[memory.add(op.sizes + row.b, 1)] = column;
}

// What is done after every column of [begin, end) has its plain value, to the columns that are a phrase's or the prefix's.
template <class T, class Team>
BEAGLE_FN void adjust_phrases(Team& team, const AdjustedNode& node, int64_t begin, int64_t end) {
  const AdjustLogits& op = node.row.op;
  const int64_t count = op.phrase_length ? op.phrase_count : 0;
  const auto last = [&](int64_t k) { return op.phrases[(k + 1) * op.phrase_length - 1]; };
  for (int64_t k = team.rank(); k < count; k += team.size()) {
    const int64_t token = last(k), column = node.row.column(token);
    if (column < begin || column >= end || !node.matches(k)) continue;
    bool earlier = false;
    for (int64_t other = 0; other < k && !earlier; ++other) earlier = last(other) == token && node.matches(other);
    if (earlier) continue;
    float bias = node.added(token);
    for (int64_t other = k; other < count; ++other)
      if (last(other) == token && node.matches(other)) bias = bias + op.phrase_bias[other];
    node.out()[column] = node.banned(token) ? -kInf : to_float(node.logits<T>()[column]) + bias;
  }
}

template <class Team>
BEAGLE_FN void adjust_seen(Team& team, const AdjustedNode& node, int64_t begin, int64_t end) {
  const AdjustedRow& row = node.row;
  float* out = node.out();
  const int32_t* listed = row.listed();
  constexpr int kTile = Team::kTile;
  const int32_t size = row.op.sizes[row.b];
  for (int32_t i = team.rank() * kTile; i < size; i += team.size() * kTile) {
    int32_t column[kTile];
    uint32_t count[kTile];
    float z[kTile];
    BEAGLE_UNROLL
    for (int t = 0; t < kTile; ++t) {
      const int32_t at = i + t < size ? listed[i + t] : -1;
      const bool within = at >= begin && at < end;
      column[t] = within ? at : -1, z[t] = within ? out[at] : 0.0f, count[t] = within ? row.counts[at] & ~kSeen : 0;
    }
    for (int64_t j = 0; j < row.op.path_length; ++j) {
      const int32_t place = node.places[j];
      BEAGLE_UNROLL
      for (int t = 0; t < kTile; ++t) count[t] += place == column[t];
    }
    BEAGLE_UNROLL
    for (int t = 0; t < kTile; ++t) z[t] = row.penalised(z[t], count[t]);
    BEAGLE_UNROLL
    for (int t = 0; t < kTile; ++t)
      if (column[t] >= 0) out[column[t]] = z[t];
  }
  for (int64_t j = team.rank(); j < row.op.path_length; j += team.size()) {
    const int32_t column = node.places[j];
    if (column < begin || column >= end || row.counts[column]) continue;
    bool earlier = false;
    for (int64_t other = 0; other < j; ++other) earlier |= node.places[other] == column;
    if (!earlier) out[column] = row.penalised(out[column], node.on_path(column));
  }
}

template <class Team>
BEAGLE_FN void ban_repeated(Team& team, const AdjustedNode& node, int64_t begin, int64_t end) {
  const int64_t n = node.row.ngram, key = node.total - n + 1;
  if (n <= 0) return;
  for (int64_t i = team.rank(); i + n <= node.total; i += team.size()) {
    int64_t j = n - 2;
    while (j >= 0 && node.at(i + j) == node.at(key + j)) --j;
    if (j >= 0) continue;
    const int64_t column = node.row.column(node.at(i + n - 1));
    if (column >= begin && column < end) team.put(node.out() + column, -kInf);
  }
}

// All of it, after a barrier; the penalties last, since what is banned stays so.
template <class T, class Team>
BEAGLE_FN void adjust_tokens(Team& team, const AdjustedNode& node, int64_t begin, int64_t end) {
  adjust_phrases<T>(team, node, begin, end);
  team.sync();
  ban_repeated(team, node, begin, end);
  if (!node.row.penalises()) return;
  team.sync();
  adjust_seen(team, node, begin, end);
}

// Columns that one part takes: whole words of `allowed`.
BEAGLE_FN int64_t part_columns(const AdjustLogits& op) {
  return ((op.width + op.chunks - 1) / op.chunks + 1023) / 1024 * 1024;
}

}  // namespace beagle
