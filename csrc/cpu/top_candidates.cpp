#include <algorithm>
#include <functional>

#include "executor.h"
#include "pool.h"
#include "rows.h"

namespace beagle::cpu {

float kth_largest(float* values, int64_t count, int64_t k) {
  std::nth_element(values, values + k - 1, values + count, std::greater<float>());
  return values[k - 1];
}

void sort_down(float* values, int64_t count) { std::sort(values, values + count, std::greater<float>()); }

namespace {

void rank_row(const TopCandidates& op, int64_t row) {
  const RowSampling sampling = op.sampling.at(row);
  const Stream stream(sampling.seed, op.positions[row], kTarget, 0);
  Best best{op.keys + row * op.k, op.k, 0};
  const int64_t groups = Columns::groups_of(op.token_ids, op.vocab) + kLanes;
  const void* logits = row_at(op.logits, op.dtype, row_offset(0, row, 0, op.stride));
  const float total = rows().rank[op.dtype](op, logits, sampling, stream, best, room(room_for(op.vocab) + groups));
  std::sort(best.keys, best.keys + best.count, std::greater<uint64_t>());
  for (int32_t i = 0; i < op.k; ++i) {
    const bool real = i < best.count;
    const int64_t column = real ? int64_t(key_index(best.keys[i])) : 0;
    op.tokens[row * op.k + i] = !real ? 0 : op.token_ids ? op.token_ids[column] : column;
    op.scores[row * op.k + i] = real ? key_value(best.keys[i]) - total : -kInf;
  }
}

}  // namespace

void top_candidates(const TopCandidates& op, int threads) {
  parallel(op.rows, threads, [&](int64_t row) { rank_row(op, row); });
}

}  // namespace beagle::cpu
