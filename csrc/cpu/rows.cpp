#include "rows.h"

#include "chain.h"
#include "perturb.h"

#ifndef BEAGLE_ISA
#define BEAGLE_ISA baseline
#endif

namespace beagle::cpu::BEAGLE_ISA {
namespace {

template <class T>
uint64_t choose(const void* logits, int64_t vocab, int64_t chunk, int64_t chunks, const RowSampling& sampling,
                const Stream& stream, int32_t& status, float* room) {
  const T* row = static_cast<const T*>(logits);
  const bool filters = sampling.filters(vocab);
  if (filters && chunk > 0) return 0;
  constexpr int64_t kPair = 2 * kGroup;
  const int64_t tokens = filters ? vocab : ((vocab + chunks - 1) / chunks + kPair - 1) / kPair * kPair;
  const int64_t begin = chunk * tokens, end = least(begin + tokens, vocab);
  if (begin >= end) return 0;
  if (!sampling.noisy()) return top_key(row, begin, end, status);
  Part<T> part(row, begin, end, stream, sampling.temperature, room);
  part.read_and_draw();
  status |= part.status;
  float logit;
  return filters ? choose_filtered(part, sampling) : choose_above(part, -kInf, -kInf, All{}, logit);
}

template <class T>
float rank(const TopCandidates& op, const void* logits, const RowSampling& sampling, const Stream& stream, Best& best,
           float* room) {
  const T* row = static_cast<const T*>(logits);
  if (!sampling.noisy()) return rank_greedy(row, op.vocab, stream, best, room);
  return rank_noisy(op, row, sampling, stream, best, room);
}

template <class T>
Law measure(const void* row, int64_t vocab, const RowSampling& sampling, float* room) {
  return law_of(static_cast<const T*>(row), vocab, sampling, room);
}

template <class T>
int32_t bounds(const void* row, int64_t vocab, const RowSampling& sampling, float* bounds, float* room) {
  return bounds_of(static_cast<const T*>(row), vocab, sampling, bounds, room);
}

template <class T>
void perturb(const void* row, int64_t begin, int64_t end, const RowSampling& sampling, const Stream& stream,
             const float* bounds, float* values) {
  perturb_part(static_cast<const T*>(row), begin, end, sampling, stream, bounds, values);
}

template <class T>
void chain(const VerifyChain& op, int64_t b, float* room) {
  const Law* laws = static_cast<const Law*>(op.laws) + b * (2 * op.steps + 1);
  Chain<T>{op, b, op.sampling.at(b), laws, room}.run();
}

}  // namespace

extern const Rows kRows;
const Rows kRows = {{choose<float>, choose<Half>, choose<BFloat>},
                    {rank<float>, rank<Half>, rank<BFloat>},
                    {measure<float>, measure<Half>, measure<BFloat>},
                    {bounds<float>, bounds<Half>, bounds<BFloat>},
                    {perturb<float>, perturb<Half>, perturb<BFloat>},
                    {chain<float>, chain<Half>, chain<BFloat>}};

}  // namespace beagle::cpu::BEAGLE_ISA
