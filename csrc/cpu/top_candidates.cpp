#include <algorithm>
#include <functional>

#include "executor.h"
#include "pool.h"
#include "rows.h"

namespace beagle::cpu {

void Best::shrink() {
  if (count <= k) return;
  std::nth_element(keys, keys + k - 1, keys + count, std::greater<uint64_t>());
  count = k, least_kept = keys[k - 1];
}

namespace {

void rank_row(const TopCandidates& op, int64_t row) {
  const RowSampling sampling = op.sampling.at(row);
  const Stream stream(sampling.seed, op.positions[row], kTarget, 0);
  Best best{op.keys + row * 2 * op.k, op.k, 0, 0};
  LogSum total;
  rows().rank[op.dtype](op, row_at(op.logits, op.dtype, row_offset(0, row, 0, op.stride)), sampling, stream, best, total);
  best.shrink();
  std::sort(best.keys, best.keys + best.count, std::greater<uint64_t>());
  for (int32_t i = 0; i < op.k; ++i) {
    const bool real = i < best.count;
    const int64_t column = real ? int64_t(key_index(best.keys[i])) : 0;
    op.tokens[row * op.k + i] = !real ? 0 : op.token_ids ? op.token_ids[column] : column;
    op.scores[row * op.k + i] = real ? key_value(best.keys[i]) - total.value() : -kInf;
  }
}

}  // namespace

void top_candidates(const TopCandidates& op, int threads) {
  parallel(op.rows, threads, [&](int64_t row) { rank_row(op, row); });
}

}  // namespace beagle::cpu
