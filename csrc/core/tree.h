// Building the dynamic tree of one row: threshold, scan, relabel, close over ancestors.
#pragma once

#include <algorithm>
#include <functional>

#include "filters.h"

namespace beagle {

// Whether a candidate breaks a rule that needs no tree to see.
BEAGLE_FN bool breaks_rule(const int64_t* tokens, const float* scores, const int32_t* parents, int32_t i) {
  const int32_t parent = parents[i];
  if (parent < -1 || parent >= i) return true;
  const float score = tidy(scores[i]);
  return score > -kInf && (tokens[i] < 0 || (parent >= 0 && score > tidy(scores[parent])));
}

// The order of the limit-th largest score, or a lower one that no more scores reach. Executors may have their own for
// their Team: the CUDA one is in cuda/build_tree.cu.
template <class Team>
BEAGLE_FN uint32_t rank_cut(Team& team, const float* scores, int32_t count, uint64_t limit, Scratch& scratch) {
  return threshold(team, count, CountItem<float>{scores, count}, limit, scratch);
}

#if !defined(__CUDACC__)
// The same by one thread: partitioning so few is cheaper than counting them.
BEAGLE_FN uint32_t rank_cut(Thread& team, const float* scores, int32_t count, uint64_t limit, Scratch& scratch) {
  constexpr int32_t kFew = 4096;
  if (count > kFew) return threshold(team, count, CountItem<float>{scores, count}, limit, scratch);
  uint32_t keys[kFew];
  for (int32_t i = 0; i < count; ++i) keys[i] = order(tidy(scores[i]));
  std::nth_element(keys, keys + limit - 1, keys + count, std::greater<uint32_t>());
  return keys[limit - 1];
}
#endif

// Gives the kept candidates labels 1, 2, ... in input order and the others 0; returns how many are kept.
template <class Team>
BEAGLE_FN int32_t label_kept(Team& team, const float* scores, int32_t count, int32_t keep, int32_t* label,
                             Scratch& scratch) {
  uint64_t real = 0;
  for (int32_t i = team.rank(); i < count; i += team.size()) real += tidy(scores[i]) > -kInf;
  real = team.sum(real);
  const uint32_t lowest = order(-kInf) + 1;
  const uint64_t limit = least<uint64_t>(real, uint64_t(keep));
  uint32_t cut = lowest;
  uint64_t ties = ~uint64_t(0);
  if (limit == 0) cut = 0xffffffffu;
  if (limit > 0 && real > limit) {
    cut = rank_cut(team, scores, count, limit, scratch);
    uint64_t above = 0;
    for (int32_t i = team.rank(); i < count; i += team.size()) above += order(tidy(scores[i])) > cut;
    ties = limit - team.sum(above);
  }
  // every member labels one run of candidates, so that one scan over the members orders ties and labels
  const int32_t per = (count + team.size() - 1) / team.size();
  const int32_t begin = least(team.rank() * per, count), end = least(begin + per, count);
  uint64_t equal = 0;
  for (int32_t i = begin; i < end; ++i) equal += order(tidy(scores[i])) == cut;
  const uint64_t equal_before = team.scan(equal);
  uint64_t own = 0, seen = equal_before;
  for (int32_t i = begin; i < end; ++i) {
    const uint32_t key = order(tidy(scores[i]));
    const bool kept = key > cut || (key == cut && seen++ < ties);
    label[i] = kept;
    own += kept;
  }
  int32_t next = int32_t(team.scan(own)) + 1;
  for (int32_t i = begin; i < end; ++i) label[i] = label[i] ? next++ : 0;
  const int32_t total = int32_t(team.sum(own));
  team.sync();
  return total;
}

// Writes node `node` under candidate `parent`, with its ancestors; false if it lies deeper than max_depth.
BEAGLE_FN bool write_node(const BuildTree& op, const int32_t* parents, const int32_t* label, int64_t at, int32_t node,
                          int64_t token, int32_t parent) {
  int64_t* mask = op.out_mask + at * op.words;
  for (int32_t w = 0; w < op.words; ++w) mask[w] = 0;
  mask[node / 64] |= int64_t(uint64_t(1) << node % 64);
  mask[0] |= 1;
  int32_t depth = 1;
  for (int32_t up = parent; up >= 0 && depth <= op.max_depth; up = parents[up], ++depth) {
    mask[label[up] / 64] |= int64_t(uint64_t(1) << label[up] % 64);
  }
  op.out_tokens[at] = token;
  op.out_parents[at] = parent < 0 ? 0 : label[parent];
  op.out_depth[at] = depth;
  return depth <= op.max_depth;
}

BEAGLE_FN void write_alone(const BuildTree& op, int64_t at, int32_t node, int64_t token) {
  int64_t* mask = op.out_mask + at * op.words;
  for (int32_t w = 0; w < op.words; ++w) mask[w] = 0;
  mask[node / 64] = int64_t(uint64_t(1) << node % 64);
  op.out_tokens[at] = token;
  op.out_parents[at] = -1;
  op.out_depth[at] = 0;
}

template <class Team>
BEAGLE_FN void build_tree(Team& team, const BuildTree& op, int64_t b, Scratch& scratch) {
  const int32_t count = op.candidates;
  const int64_t row = b * count, out = b * op.nodes;
  const int64_t* tokens = op.tokens + row;
  const float* scores = op.scores + row;
  const int32_t* parents = op.parents + row;
  int32_t* label = op.label + row;

  bool wrong = op.root[b] < 0;
  for (int32_t i = team.rank(); i < count; i += team.size()) wrong |= breaks_rule(tokens, scores, parents, i);
  wrong = team.any(wrong);
  int32_t kept = 0;
  if (!wrong) {
    kept = label_kept(team, scores, count, op.nodes - 1, label, scratch);
    for (int32_t i = team.rank(); i < count; i += team.size()) {
      if (label[i]) wrong |= !write_node(op, parents, label, out + label[i], label[i], tokens[i], parents[i]);
    }
    wrong = team.any(wrong);
  }
  for (int32_t n = (wrong ? 0 : kept + 1) + team.rank(); n < op.nodes; n += team.size()) write_alone(op, out + n, n, 0);
  if (team.rank() == 0) {
    if (!wrong) write_alone(op, out, 0, op.root[b]);
    op.out_size[b] = wrong ? 0 : kept + 1;
  }
}

}  // namespace beagle
