// Verification of a drafted chain from logits: laws of rows, and the rules by which drafted tokens are accepted.
#pragma once

#include "filters.h"

namespace beagle {

// softmax(filtered(z) / T) of one row, or the point mass on `best`.
struct Law {
  float top, scale2, far;  // largest logit; log2(e) / T; -125 over that
  float cut, floor;        // kept is z >= cut, if log2 of its probability over the largest is at least floor
  float scale;             // 1 / sum of exp((z - top) / T) over what is kept; 0: point mass
  uint32_t best;
  int32_t status;
  BEAGLE_FN float log_ratio(float z) const { return (z - top) * scale2; }
  BEAGLE_FN float at(float z) const {
    // a product, for a choice would become a branch and keep the loop from being vectorised
    const float d = z - top, kept = z >= cut ? scale : 0.0f;
    return exp2_of(most(d, far), scale2) * (d * scale2 >= floor ? kept : 0.0f);
  }
  template <class T>
  BEAGLE_FN float operator()(const T* row, int64_t token) const {
    if (scale == 0.0f) return token == int64_t(best) ? 1.0f : 0.0f;
    return at(tidy(to_float(row[token])));
  }
};

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

// Weight of the block rule after a drafted token of these probabilities, from that before it.
BEAGLE_FN double next_weight(double w, float drafted_p, float drafted_q) {
  const double mine = w * double(drafted_p), theirs = double(drafted_q);
  return mine > 0.0 ? (mine < theirs ? mine / theirs : 1.0) : 0.0;
}

// Whether the token rule takes a drafted token by its coin.
BEAGLE_FN bool token_passes(double u, float drafted_p, float drafted_q) { return u * double(drafted_q) < double(drafted_p); }

// One row of verify_chain; T is the type of both logits.
template <class T>
struct ChainRow {
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
  BEAGLE_FN int64_t column(int64_t token) const { return column_of(op.token_ids, op.draft_vocab, token); }
  BEAGLE_FN double coin_at(int64_t i) const { return coin(sampling.seed, op.positions[b] + i, kAccept, op.positions[b]); }
  BEAGLE_FN Stream residual_noise(int64_t n) const { return {sampling.seed, op.positions[b] + n, kResidual, op.positions[b]}; }

  // Whether draft token i, or every one, is one the draft could have drawn.
  BEAGLE_FN bool sound(int64_t i) const { return column(token(i)) >= 0 && token(i) >= 0 && token(i) < op.vocab; }
  BEAGLE_FN bool sound() const {
    bool good = true;
    for (int64_t i = 0; i < op.steps; ++i) good &= sound(i);
    return good;
  }
  BEAGLE_FN float p_drafted(int64_t i) const { return p(i)(target(i), token(i)); }
  BEAGLE_FN float q_drafted(int64_t i) const { return q(i)(draft(i), column(token(i))); }
  // Whether surpluses and residuals take both rows column by column.
  BEAGLE_FN bool dense(int64_t i) const { return !op.token_ids && p(i).scale > 0.0f && q(i).scale > 0.0f; }

  BEAGLE_FN int64_t accept_tokens() const {
    int64_t n = 0;
    while (n < op.steps && token_passes(coin_at(n), p_drafted(n), q_drafted(n))) ++n;
    return n;
  }
  BEAGLE_FN double weight_after(int64_t i, double w) const { return next_weight(w, p_drafted(i), q_drafted(i)); }
  // Whether the block rule takes the first i + 1 tokens; more: the surplus of step i + 1, where there is one.
  BEAGLE_FN bool block_passes(int64_t i, double u, double w, double more) const {
    return i + 1 < op.steps ? u * (more + 1.0 - w) < more : u < w;
  }
  BEAGLE_FN bool block_passes(int64_t i, double w, double more) const { return block_passes(i, coin_at(i), w, more); }
  // w p_n - q_n of a token, or w p_n.
  BEAGLE_FN float rest(int64_t n, float w, bool minus, int64_t token, float z) const {
    const float mine = p(n).at(z) * w;
    const int64_t c = minus ? column(token) : -1;
    return c >= 0 ? mine - q(n)(draft(n), c) : mine;
  }
  BEAGLE_FN int32_t status() const {
    int32_t status = 0;
    for (int64_t i = 0; i < 2 * op.steps + 1; ++i) status |= laws[i].status;
    return status;
  }
  BEAGLE_FN void write(int64_t n, int64_t next, bool good) const {
    int32_t* path = op.verdict.path + b * (op.steps + 1);
    for (int64_t i = 0; i <= op.steps; ++i) path[i] = i <= n ? int32_t(i) : -1;
    op.verdict.num_accepted[b] = int32_t(n);
    op.verdict.next_token[b] = next;
    op.verdict.status[b] = status() | (good ? 0 : kStatusBadTree);
  }
};

// A rest of probability below this is none.
constexpr float kNoRest = 1e-37f;

}  // namespace beagle
