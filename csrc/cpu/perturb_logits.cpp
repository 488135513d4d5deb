#include "executor.h"
#include "pool.h"
#include "rows.h"

namespace beagle::cpu {

void perturb_logits(const PerturbLogits& op, int threads) {
  const auto logits = [&](int64_t row) { return row_at(op.logits, op.dtype, row_offset(0, row, 0, op.stride)); };
  parallel(op.rows, threads, [&](int64_t row) {
    op.status[row] = rows().bounds[op.dtype](logits(row), op.vocab, op.sampling.at(row), op.bounds + 2 * row,
                                             room(room_for(op.vocab)));
  });
  const int64_t tokens = ((op.vocab + op.chunks - 1) / op.chunks + kGroup - 1) / kGroup * kGroup;
  parallel(op.rows * op.chunks, threads, [&](int64_t task) {
    const int64_t row = task / op.chunks, begin = task % op.chunks * tokens, end = least(begin + tokens, op.vocab);
    const RowSampling sampling = op.sampling.at(row);
    const Stream stream(sampling.seed, op.positions[row], kTarget, 0);
    float* values = op.values + row * op.vocab;
    if (begin < end) rows().perturb[op.dtype](logits(row), begin, end, sampling, stream, op.bounds + 2 * row, values);
    if (begin == 0 && op.status[row] & kStatusNoFinite) {
      values[0] = sampling.noisy() ? sampling.temperature * token_noise(stream, 0) : 0.0f;
    }
  });
}

}  // namespace beagle::cpu
