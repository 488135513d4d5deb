// Verification of a drafted chain from logits; no row of probabilities is stored.
#pragma once

#include "sampling.h"

namespace beagle {

// softmax(filtered(z) / T) of one row, or the point mass on `best`.
struct Law {
  float top, cut, temperature, scale;  // scale: 1 / sum of exp((z - top) / T) over z >= cut; 0: point mass
  uint32_t best;
  int32_t status;
  template <class T>
  BEAGLE_FN float operator()(const T* row, int64_t token) const {
    if (scale == 0.0f) return token == int64_t(best) ? 1.0f : 0.0f;
    return at(tidy(to_float(row[token])));
  }
  BEAGLE_FN float at(float z) const {
    // a product, for a choice would become a branch and keep the loop from being vectorised
    return exp_of((z - top) / temperature) * (z >= cut ? scale : 0.0f);
  }
};

template <class Team, class T>
BEAGLE_FN Law measure(Team& team, const T* row, int64_t vocab, const RowSampling& sampling, Scratch& scratch) {
  Law law{0.0f, -kInf, sampling.temperature, 0.0f, 0, 0};
  const uint64_t key = top_key(team, row, 0, vocab, law.status);
  if (key == 0) {
    law.status |= kStatusNoFinite;
    return law;
  }
  law.best = key_index(key), law.top = key_value(key);
  if (!sampling.noisy()) return law;
  if (sampling.filters(vocab)) law.cut = filter_cut(team, row, vocab, sampling, law.top, scratch);
  law.scale = 1.0f;
  constexpr int kTile = Team::kTile;
  alignas(64) float z[kTile];
  double sum = 0.0;
  for (int64_t i = team.rank() * kTile; i < vocab; i += int64_t(team.size()) * kTile) {
    load_tile(row, i, vocab, z);
    BEAGLE_UNROLL
    for (int j = 0; j < kTile; ++j) z[j] = law.at(z[j]);
    sum += double(lane_sum(z));
  }
  law.scale = float(1.0 / team.sum(sum));
  return law;
}

// The column of a full token id in a reduced vocabulary, -1 if it is not there; null ids mean all of them.
BEAGLE_FN int64_t column_of(const int64_t* ids, int64_t count, int64_t token) {
  if (!ids) return token >= 0 && token < count ? token : -1;
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ids[middle] < token) low = middle + 1; else high = middle;
  }
  return low < count && ids[low] == token ? low : -1;
}

// One row of verify_chain; T is the type of both logits.
template <class T>
struct Chain {
  const VerifyChain& op;
  int64_t b;
  RowSampling sampling;
  const Law* laws;  // K + 1 of the target, then K of the draft

  BEAGLE_FN const T* target(int64_t i) const {
    return static_cast<const T*>(op.target) + row_offset(b, i, op.target_b, op.target_n);
  }
  BEAGLE_FN const T* draft(int64_t i) const {
    return static_cast<const T*>(op.draft) + row_offset(b, i, op.draft_b, op.draft_n);
  }
  BEAGLE_FN const Law& p(int64_t i) const { return laws[i]; }
  BEAGLE_FN const Law& q(int64_t i) const { return laws[op.steps + 1 + i]; }
  BEAGLE_FN int64_t token(int64_t i) const { return op.draft_tokens[b * op.steps + i]; }
  BEAGLE_FN double coin_at(int64_t i) const { return coin(sampling.seed, op.positions[b] + i, kAccept, op.positions[b]); }

  // Whether every draft token is one the draft could have drawn.
  BEAGLE_FN bool sound() const {
    bool good = true;
    for (int64_t i = 0; i < op.steps; ++i) {
      good &= column_of(op.token_ids, op.draft_vocab, token(i)) >= 0 && token(i) >= 0 && token(i) < op.vocab;
    }
    return good;
  }
  BEAGLE_FN float p_drafted(int64_t i) const { return p(i)(target(i), token(i)); }
  BEAGLE_FN float q_drafted(int64_t i) const {
    return q(i)(draft(i), column_of(op.token_ids, op.draft_vocab, token(i)));
  }

  // sum of max(w p_i - q_i, 0) where both are proper laws over the same vocabulary, by tiles.
  template <class Team>
  BEAGLE_FN double dense_surplus(Team& team, int64_t i, float w) const {
    constexpr int kTile = Team::kTile;
    alignas(64) float mine[kTile], theirs[kTile];
    const Law law = p(i), other = q(i);
    double sum = 0.0;
    for (int64_t c = team.rank() * kTile; c < op.vocab; c += int64_t(team.size()) * kTile) {
      load_tile(target(i), c, op.vocab, mine);
      load_tile(draft(i), c, op.vocab, theirs);
      BEAGLE_UNROLL
      for (int j = 0; j < kTile; ++j) mine[j] = most(w * law.at(mine[j]) - other.at(theirs[j]), 0.0f);
      sum += double(lane_sum(mine));
    }
    return team.sum(sum);
  }

  // sum of max(w p_i - q_i, 0): w outside the draft's vocabulary, the difference inside.
  template <class Team>
  BEAGLE_FN double surplus(Team& team, int64_t i, double w) const {
    if (!op.token_ids && p(i).scale > 0.0f && q(i).scale > 0.0f) return dense_surplus(team, i, float(w));
    double sum = 0.0;
    for (int64_t c = team.rank(); c < op.draft_vocab; c += team.size()) {
      const float mine = p(i)(target(i), op.token_ids ? op.token_ids[c] : c);
      const double difference = w * double(mine) - double(q(i)(draft(i), c));
      sum += (difference > 0.0 ? difference : 0.0) - w * double(mine);
    }
    const double all = team.sum(sum) + w;
    return all > 0.0 ? all : 0.0;
  }

  BEAGLE_FN int64_t accept_tokens() const {
    int64_t n = 0;
    while (n < op.steps && coin_at(n) * double(q_drafted(n)) < double(p_drafted(n))) ++n;
    return n;
  }

  template <class Team>
  BEAGLE_FN int64_t accept_block(Team& team, double& kept) const {
    int64_t n = 0;
    double w = 1.0;
    for (int64_t i = 0; i < op.steps; ++i) {
      const double mine = w * double(p_drafted(i)), theirs = double(q_drafted(i));
      w = mine > 0.0 ? (mine < theirs ? mine / theirs : 1.0) : 0.0;
      bool passes = coin_at(i) < w;
      if (i + 1 < op.steps) {
        const double more = surplus(team, i + 1, w);
        passes = coin_at(i) * (more + 1.0 - w) < more;
      }
      if (passes) n = i + 1, kept = w;
    }
    return n;
  }

  struct Bound {
    Law law;
    float w;
    BEAGLE_FN float operator()(float z) const {
      const float roof = law.scale * exp_of((least(z, law.top) - law.top) / law.temperature) * w;
      return roof > 1e-37f ? log_of(roof) + 1e-5f : -80.0f;
    }
  };

  struct Score {
    const Chain& chain;
    Law law;
    int64_t n;
    float w;
    bool minus;
    BEAGLE_FN uint64_t operator()(int64_t token, float z, uint32_t word) const {
      float rest = law.at(z) * w;
      const int64_t column = minus ? column_of(chain.op.token_ids, chain.op.draft_vocab, token) : -1;
      if (column >= 0) rest -= chain.q(n)(chain.draft(n), column);
      return rest > 1e-37f ? make_key(log_of(rest) + gumbel(word), uint32_t(token)) : 0;
    }
  };

  // argmax of log max(w p_n - q_n, 0) + g, or of log p_n + g where minus is false.
  template <class Team>
  BEAGLE_FN uint64_t draw(Team& team, int64_t n, float w, bool minus) const {
    const Law law = p(n);
    const Stream stream(sampling.seed, op.positions[b] + n, kResidual, op.positions[b]);
    return noisy_argmax(team, target(n), 0, op.vocab, stream, 1.0f, 0, Bound{law, w},
                        Score{*this, law, n, w, minus});
  }

  template <class Team>
  BEAGLE_FN void run(Team& team) const {
    int32_t status = 0;
    for (int64_t i = 0; i < 2 * op.steps + 1; ++i) status |= laws[i].status;
    const bool good = sound();
    double w = 1.0;
    const int64_t n = !good ? 0 : op.block ? accept_block(team, w) : accept_tokens();
    int64_t next = p(n).best;
    if (p(n).scale > 0.0f) {
      uint64_t key = draw(team, n, float(w), good && n < op.steps);
      if (key == 0) key = draw(team, n, 1.0f, false);
      if (key != 0) next = key_index(key);
    }
    int32_t* path = op.verdict.path + b * (op.steps + 1);
    for (int64_t i = team.rank(); i <= op.steps; i += team.size()) path[i] = i <= n ? int32_t(i) : -1;
    if (team.rank() != 0) return;
    op.verdict.num_accepted[b] = int32_t(n);
    op.verdict.next_token[b] = next;
    op.verdict.status[b] = status | (good ? 0 : kStatusBadTree);
  }
};

}  // namespace beagle
