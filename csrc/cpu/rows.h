// The loops over a row's logits, compiled once for every instruction set (see setup.py) and chosen when first used.
// What rows.cpp includes is always inlined, so no two of its objects share a symbol.
#pragma once

#include "../core/candidates.h"
#include "../core/chain.h"

namespace beagle::cpu {

// The k largest keys offered so far, kept as up to 2 k unordered ones.
struct Best {
  uint64_t* keys;
  int32_t k, count;
  uint64_t least_kept;
  void shrink();
};

struct Rows {
  uint64_t (*choose[3])(const void* row, int64_t vocab, int64_t chunk, int64_t chunks, const RowSampling&, const Stream&,
                        int32_t& status);
  void (*rank[3])(const TopCandidates&, const void* row, const RowSampling&, const Stream&, Best&, LogSum&);
  Law (*measure[3])(const void* row, int64_t vocab, const RowSampling&);
  void (*chain[3])(const VerifyChain&, int64_t b);
};

const Rows& rows();

constexpr int64_t kItemSize[3] = {4, 2, 2};
BEAGLE_FN const void* row_at(const void* logits, int32_t dtype, int64_t offset) {
  return static_cast<const char*>(logits) + offset * kItemSize[dtype];
}

}  // namespace beagle::cpu
