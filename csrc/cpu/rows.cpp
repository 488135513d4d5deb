#include "rows.h"

#ifndef BEAGLE_ISA
#define BEAGLE_ISA baseline
#endif

namespace beagle::cpu::BEAGLE_ISA {
namespace {

template <class T>
uint64_t choose(const void* row, int64_t vocab, int64_t chunk, int64_t chunks, const RowSampling& sampling, const Stream& stream,
                int32_t& status) {
  Thread team;
  Scratch scratch;
  return choose_chunk(team, static_cast<const T*>(row), vocab, chunk, chunks, sampling, stream, status, scratch);
}

template <class T>
void rank(const TopCandidates& op, const void* logits, const RowSampling& sampling, const Stream& stream, Best& best,
          LogSum& total) {
  constexpr int kTile = Thread::kTile;
  const T* row = static_cast<const T*>(logits);
  Thread team;
  Scratch scratch;
  const float cut = penalty_cut(team, row, op.vocab, sampling, scratch);
  alignas(64) float value[kTile];
  for (int64_t i = 0; i < op.vocab; i += kTile) {
    load_tile(row, i, op.vocab, value);
    perturb_tile(value, i, op.vocab, sampling, cut, stream, op.token_ids);
    const float top = tile_max(value);
    if (top == -kInf) continue;
    total.add(top, tile_sum(value, top));
    if (make_key(top, uint32_t(i)) <= best.least_kept) continue;
    const float least_value = best.least_kept ? key_value(best.least_kept) : -kInf;
    for (int j = 0; j < kTile; ++j) {
      if (!(value[j] >= least_value) || value[j] == -kInf) continue;
      const uint64_t key = make_key(value[j], uint32_t(i + j));
      if (key <= best.least_kept) continue;
      best.keys[best.count++] = key;
      if (best.count == 2 * best.k) best.shrink();
    }
  }
}

template <class T>
Law measure(const void* row, int64_t vocab, const RowSampling& sampling) {
  Thread team;
  Scratch scratch;
  return beagle::measure(team, static_cast<const T*>(row), vocab, sampling, scratch);
}

template <class T>
void chain(const VerifyChain& op, int64_t b) {
  Thread team;
  const Law* laws = static_cast<const Law*>(op.laws) + b * (2 * op.steps + 1);
  Chain<T>{op, b, op.sampling.at(b), laws}.run(team);
}

}  // namespace

extern const Rows kRows;
const Rows kRows = {{choose<float>, choose<Half>, choose<BFloat>},
                    {rank<float>, rank<Half>, rank<BFloat>},
                    {measure<float>, measure<Half>, measure<BFloat>},
                    {chain<float>, chain<Half>, chain<BFloat>}};

}  // namespace beagle::cpu::BEAGLE_ISA
