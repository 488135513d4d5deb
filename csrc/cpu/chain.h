// Verification of a drafted chain by one thread.
#pragma once

#include "../core/chain.h"
#include "nucleus.h"

namespace beagle::cpu {

// Probabilities of 16 logits under a law that is no point mass.
BEAGLE_FN Reals probability(const Law& law, const Reals& z) {
  const Reals d = z - law.top, p = exp2_of(at_least(d, law.far), law.scale2) * law.scale;
  return Reals(Marks(p) & (z >= law.cut) & (d * law.scale2 >= law.floor));
}

template <class T>
BEAGLE_OWN Law law_of(const T* row, int64_t vocab, const RowSampling& sampling, float* room) {
  Law law{};
  law.scale2 = 1.0f, law.cut = law.floor = -kInf;
  Part<T> part(row, 0, vocab, Stream(0, 0, 0, 0), sampling.temperature, room);
  part.read();
  law.status = part.status, law.top = part.top();
  if (law.top == -kInf) {
    law.status |= kStatusNoFinite;
    return law;
  }
  int64_t u = 0;
  while (part.tops[u] != law.top) ++u;
  law.best = key_index(scan_key(row, part.first(u), least(part.first(u) + kGroup, vocab), law.status));
  if (!sampling.noisy()) return law;
  const Kept kept = kept_of(part, sampling);
  law.scale2 = kept.scale, law.far = -125.0f / kept.scale;
  law.floor = kept.floor, law.cut = nucleus_cut(part, kept, sampling.top_p), law.scale = 1.0f;
  // what lies further below the largest changes no bit of the sum
  const float low = law.top - 58.0f / kept.scale;
  LaneSum sum;
  alignas(64) float z[kGroup];
  for (u = 0; u < part.count; ++u) {
    if (part.tops[u] < low) continue;
    load_finite(row, part.first(u), vocab, law.top, z);
    for (int v = 0; v < kGroup; v += kLanes) sum.add(probability(law, lanes_at(z + v)));
  }
  law.scale = float(1.0 / sum.total());
  return law;
}

template <class T>
struct Chain : ChainRow<T> {
  float* room;
  using Row = ChainRow<T>;
  using Row::op, Row::p, Row::q;

  // sum of max(w p_i - q_i, 0) where both are proper laws over the same vocabulary.
  BEAGLE_FN double dense_surplus(int64_t i, float w) const {
    alignas(64) float mine[kGroup], theirs[kGroup];
    const Law law = p(i), other = q(i);
    LaneSum sum;
    for (int64_t c = 0; c < op.vocab; c += kGroup) {
      load_finite(Row::target(i), c, op.vocab, law.top, mine);
      load_finite(Row::draft(i), c, op.vocab, other.top, theirs);
      for (int v = 0; v < kGroup; v += kLanes) {
        const Reals rest = probability(law, lanes_at(mine + v)) * w - probability(other, lanes_at(theirs + v));
        sum.add(at_least(rest, 0.0f));
      }
    }
    return sum.total();
  }

  // sum of max(w p_i - q_i, 0): w outside the draft's vocabulary, the difference inside.
  BEAGLE_FN double surplus(int64_t i, double w) const {
    if (Row::dense(i)) return dense_surplus(i, float(w));
    double sum = w;
    for (int64_t c = 0; c < op.draft_vocab; ++c) {
      const double mine = w * double(p(i)(Row::target(i), op.token_ids ? op.token_ids[c] : c));
      sum += most(mine - double(q(i)(Row::draft(i), c)), 0.0) - mine;
    }
    return most(sum, 0.0);
  }

  BEAGLE_FN int64_t accept_block(double& kept) const {
    int64_t n = 0;
    double w = 1.0;
    for (int64_t i = 0; i < op.steps; ++i) {
      w = Row::weight_after(i, w);
      if (Row::block_passes(i, w, i + 1 < op.steps ? surplus(i + 1, w) : 0.0)) n = i + 1, kept = w;
    }
    return n;
  }

  // w p_n - q_n, or w p_n, of the tokens of a group.
  BEAGLE_FN void rests(int64_t n, float w, bool minus, int64_t first, float (&rest)[kGroup]) const {
    const Law law = p(n);
    load_finite(Row::target(n), first, op.vocab, law.top, rest);
    if (minus && !Row::dense(n)) {
      const int have = int(least<int64_t>(kGroup, op.vocab - first));
      for (int j = 0; j < have; ++j) rest[j] = Row::rest(n, w, minus, first + j, rest[j]);
      return;
    }
    for (int v = 0; v < kGroup; v += kLanes) *reinterpret_cast<Reals*>(rest + v) = probability(law, lanes_at(rest + v)) * w;
    if (!minus) return;
    alignas(64) float theirs[kGroup];
    const Law other = q(n);
    load_finite(Row::draft(n), first, op.vocab, other.top, theirs);
    for (int v = 0; v < kGroup; v += kLanes)
      *reinterpret_cast<Reals*>(rest + v) = lanes_at(rest + v) - probability(other, lanes_at(theirs + v));
  }

  // argmax of log max(w p_n - q_n, 0) + g, or of log p_n + g where minus is false; 0 if nothing is left.
  BEAGLE_FN uint64_t draw(int64_t n, float w, bool minus) const {
    Part<T> part(Row::target(n), 0, op.vocab, Row::residual_noise(n), 1.0f, room);
    noise_bounds(part.stream, 0, part.count, part.noise);
    alignas(64) float rest[kGroup];
    for (int64_t u = 0; u < part.count; ++u) {
      rests(n, w, minus, part.first(u), rest);
      const float top = largest(rest, kGroup);
      part.tops[u] = top > kNoRest ? log_of(top) : -kInf;
    }
    part.set_bounds(-kInf, -kInf);
    uint64_t best = 0;
    const auto least = [&]() BEAGLE_INLINED { return best ? reach_of(key_value(best), 1.0f) : -kInf; };
    search(part.frontier(), least, [&](int64_t u) BEAGLE_INLINED {
      rests(n, w, minus, part.first(u), rest);
      for (int j = 0; j < kGroup; ++j) rest[j] = rest[j] > kNoRest ? log_of(rest[j]) : -kInf;
      look_into(rest, 1.0f, part.stream, uint32_t(u), part.noise[u], least, [&](int j, float g) BEAGLE_INLINED {
        if (rest[j] > -kInf) best = most(best, make_key(rest[j] + g, uint32_t(part.first(u) + j)));
      });
    });
    return best;
  }

  BEAGLE_FN void run() const {
    const bool good = Row::sound();
    double w = 1.0;
    const int64_t n = !good ? 0 : op.block ? accept_block(w) : Row::accept_tokens();
    int64_t next = p(n).best;
    if (p(n).scale > 0.0f) {
      uint64_t key = draw(n, float(w), good && n < op.steps);
      if (key == 0) key = draw(n, 1.0f, false);
      if (key != 0) next = key_index(key);
    }
    Row::write(n, next, good);
  }
};

}  // namespace beagle::cpu
