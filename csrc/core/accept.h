// Bit-parallel acceptance of one row's tree.
#pragma once

#include "ops.h"

namespace beagle {

constexpr int kMaxWords = kMaxNodes / 64;

BEAGLE_FN bool node_is_sound(const Tree& tree, int64_t row, int32_t node) {
  const int64_t at = row + node;
  const int64_t* mask = tree.mask + at * tree.words;
  const int32_t parent = tree.parents[at];
  if (node == 0 ? parent != -1 : parent < 0 || parent >= node) return false;
  if (tree.depth[at] != (node == 0 ? 0 : tree.depth[row + parent] + 1) || tree.depth[at] > tree.max_depth) return false;
  const int64_t* above = node == 0 ? nullptr : tree.mask + (row + parent) * tree.words;
  bool sound = true;
  for (int32_t w = 0; w < tree.words; ++w) {
    const uint64_t own = w == node / 64 ? uint64_t(1) << node % 64 : 0;
    sound &= uint64_t(mask[w]) == ((above ? uint64_t(above[w]) : 0) | own);
  }
  return sound;
}

// chosen[n] is the target's choice at node n of row b, status_of(n) what it says of that; match is scratch the team
// shares.
template <class Team, class StatusOf>
BEAGLE_FN void accept_tree(Team& team, const Tree& tree, int64_t b, const int64_t* chosen, const StatusOf& status_of,
                           const Verdict& out, uint64_t (&match)[kMaxWords]) {
  const int64_t row = b * tree.nodes;
  const int32_t size = tree.size[b];
  bool wrong = size < 1 || size > tree.nodes;
  for (int32_t n = team.rank(); !wrong && n < size; n += team.size()) wrong = !node_is_sound(tree, row, n);
  wrong = team.any(wrong);

  for (int32_t w = team.rank(); w < tree.words; w += team.size()) match[w] = w == 0;
  team.sync();
  for (int32_t n = 1 + team.rank(); !wrong && n < size; n += team.size()) {
    if (tree.tokens[row + n] == chosen[tree.parents[row + n]]) team.set(&match[n / 64], uint64_t(1) << n % 64);
  }
  team.sync();
  uint64_t best = uint32_t(~0u);  // depth 0, node 0
  for (int32_t n = 1 + team.rank(); !wrong && n < size; n += team.size()) {
    const int64_t* mask = tree.mask + (row + n) * tree.words;
    uint64_t missed = 0;
    for (int32_t w = 0; w < tree.words; ++w) missed |= uint64_t(mask[w]) & ~match[w];
    if (!missed) best = most(best, uint64_t(tree.depth[row + n]) << 32 | uint32_t(~n));
  }
  best = team.max(best);

  const int32_t depth = int32_t(best >> 32), last = int32_t(~uint32_t(best));
  int32_t* path = out.path + b * (tree.max_depth + 1);
  for (int32_t d = depth + 1 + team.rank(); d <= tree.max_depth; d += team.size()) path[d] = -1;
  if (team.rank() != 0) return;
  int32_t status = 0;
  for (int32_t d = depth, n = last; d >= 0; --d, n = tree.parents[row + n]) {
    path[d] = n, status |= status_of(n);
    if (d == 0) break;
  }
  out.num_accepted[b] = depth;
  out.next_token[b] = chosen[last];
  out.status[b] = status | (wrong ? kStatusBadTree : 0);
}

}  // namespace beagle
