// The loops over a row's logits, compiled once for every instruction set (see setup.py) and chosen when first used.
// What rows.cpp includes is inlined or static, so no two of its objects share a symbol.
#pragma once

#include "../core/chain.h"
#include "candidates.h"

namespace beagle::cpu {

struct Rows {
  // Chunk `chunk` of `chunks` of a row: the best key, 0 if no token is above -inf. A row with filters is chunk 0's alone.
  uint64_t (*choose[3])(const void* row, int64_t vocab, int64_t chunk, int64_t chunks, const RowSampling&, const Stream&,
                        int32_t& status, float* room);
  // Leaves a row's k best in the heap and returns what their scores are measured from.
  float (*rank[3])(const TopCandidates&, const void* row, const RowSampling&, const Stream&, Best&, float* room);
  Law (*measure[3])(const void* row, int64_t vocab, const RowSampling&, float* room);
  // Into bounds the largest logit and the least that top-k and top-p keep; returns the status.
  int32_t (*bounds[3])(const void* row, int64_t vocab, const RowSampling&, float* bounds, float* room);
  void (*perturb[3])(const void* row, int64_t begin, int64_t end, const RowSampling&, const Stream&, const float* bounds,
                     float* values);
  void (*chain[3])(const VerifyChain&, int64_t b, float* room);
};

const Rows& rows();

constexpr int64_t kItemSize[3] = {4, 2, 2};
BEAGLE_FN const void* row_at(const void* logits, int32_t dtype, int64_t offset) {
  return static_cast<const char*>(logits) + offset * kItemSize[dtype];
}

}  // namespace beagle::cpu
