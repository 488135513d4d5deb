// Where the end of one row's text stood earlier in it, and what followed.
#pragma once

#include "ops.h"

namespace beagle {

// How many tokens before `end` are those before the text's own end, `longest` at most; a placeholder equals none.
BEAGLE_FN int32_t matching(const int64_t* text, int64_t length, int64_t end, int32_t longest) {
  int32_t matched = 0;
  while (matched < longest && matched < end) {
    const int64_t token = text[end - 1 - matched];
    if (token < 0 || token != text[length - 1 - matched]) break;
    ++matched;
  }
  return matched;
}

// The best earlier end as a key: how many tokens match before it, then where it is; 0 where none matches. Each member
// goes back from the text's end, so that the first of equals is the latest, and an end has to match beyond what the
// member has found already.
template <class Team>
BEAGLE_FN uint64_t best_end(Team& team, const int64_t* text, int64_t length, int32_t longest) {
  constexpr int kTile = Team::kTile;
  const int64_t step = team.size(), last = length > 0 ? text[length - 1] : -1;
  uint64_t best = 0;
  int32_t found = 0;
  for (int64_t top = length - 1 - team.rank(); last >= 0 && top > found && found < longest; top -= kTile * step) {
    const int64_t before = text[length - 1 - found];
    if (const int64_t bottom = top - (kTile - 1) * step; bottom > found) {
      int64_t hit = 0;
      BEAGLE_UNROLL
      for (int i = 0; i < kTile; ++i) {
        const int64_t* token = text + bottom - 1 + i * step;
        hit |= ((token[0] ^ last) | (token[-found] ^ before)) == 0;
      }
      if (!hit) continue;
    }
    for (int i = 0; i < kTile; ++i) {
      const int64_t end = top - i * step;
      if (end <= found || found == longest) break;
      if (text[end - 1 - found] != text[length - 1 - found]) continue;
      const int32_t matched = matching(text, length, end, longest);
      if (matched > found) found = matched, best = uint64_t(uint32_t(matched)) << 32 | uint32_t(end);
    }
  }
  return team.max(best);
}

template <class Team>
BEAGLE_FN void lookup(Team& team, const Lookup& op, int64_t b) {
  const int64_t* text = op.text + row_offset(b, 0, op.stride, 0);
  const int64_t length = most<int64_t>(0, least<int64_t>(op.lengths[b], op.size));
  const uint64_t best = best_end(team, text, length, op.longest);
  const uint32_t end = uint32_t(best), period = uint32_t(length) - end;

  uint64_t missing = best ? 0 : uint64_t(op.count);
  for (int32_t i = team.rank(); best && i < op.count; i += team.size()) {
    if (text[end + uint32_t(i) % period] < 0) missing = most(missing, uint64_t(op.count - i));
  }
  const int32_t copied = op.count - int32_t(team.max(missing));
  int64_t* tokens = op.tokens + b * op.count;
  for (int32_t i = team.rank(); i < op.count; i += team.size()) {
    tokens[i] = i < copied ? text[end + uint32_t(i) % period] : -1;
  }
  if (team.rank() == 0) op.matched[b] = int32_t(best >> 32);
}

}  // namespace beagle
