// A chain of tokens from the root joins the candidates of one row.
#pragma once

#include "ops.h"

namespace beagle {

// The first child of candidate `parent` (-1: the root) with this token that build_tree could keep; -1: there is none.
template <class Team>
BEAGLE_FN int32_t child_with(Team& team, const JoinBranch& op, int64_t row, int32_t parent, int64_t token) {
  uint64_t first = 0;
  for (int32_t j = parent + 1 + team.rank(); j < op.candidates && !first; j += team.size()) {
    if (op.parents[row + j] != parent || op.tokens[row + j] != token) continue;
    if (op.scores[row + j] > -kInf) first = uint32_t(~j);
  }
  first = team.max(first);
  return first ? int32_t(~uint32_t(first)) : -1;
}

// Every member walks, since where the chain goes is the same for all; they share the search for a child.
template <class Team>
BEAGLE_FN void join_branch(Team& team, const JoinBranch& op, int64_t b) {
  const int32_t count = op.candidates, columns = count + op.steps;
  const int64_t row = b * count, out = b * columns;
  for (int32_t j = team.rank(); j < columns; j += team.size()) {
    const bool given = j < count;
    op.out_tokens[out + j] = given ? op.tokens[row + j] : 0;
    op.out_scores[out + j] = given ? op.scores[row + j] : -kInf;
    op.out_parents[out + j] = given ? op.parents[row + j] : -1;
  }
  team.sync();

  int32_t at = -1;
  float bound = 0.0f;
  for (int32_t i = 0; i < op.steps; ++i) {
    const int64_t token = op.branch_tokens[b * op.steps + i];
    const float score = op.branch_scores[b * op.steps + i];
    if (token < 0 || !(score > -kInf)) break;
    bound = least(bound, score);
    const int32_t met = at < count ? child_with(team, op, row, at, token) : -1;
    if (team.rank() == 0 && met >= 0) op.out_scores[out + met] = most(op.scores[row + met], bound);
    // No child comes above its parent: what stands above on the chain was raised to a bound no lower than this one.
    if (team.rank() == 0 && met < 0) {
      op.out_tokens[out + count + i] = token;
      op.out_scores[out + count + i] = bound;
      op.out_parents[out + count + i] = at;
    }
    at = met >= 0 ? met : count + i;
  }
}

}  // namespace beagle
