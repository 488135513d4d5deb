#include "executor.h"
#include "pool.h"
#include "../core/sampling.h"
#include "rows.h"

namespace beagle::cpu {

void choose_tokens(const ChooseTokens& op, int threads) {
  const auto choose = rows().choose[op.dtype];
  parallel(op.rows * op.chunks, threads, [&](int64_t task) {
    const int64_t row = task / op.chunks;
    const RowSampling sampling = op.sampling.at(row);
    const Stream stream(sampling.seed, op.positions[row], op.stream, op.rounds ? op.rounds[row] : 0);
    const void* logits = row_at(op.logits, op.dtype, row_offset(0, row, 0, op.stride));
    op.flags[task] = 0;
    op.keys[task] = choose(logits, op.vocab, task % op.chunks, op.chunks, sampling, stream, op.flags[task],
                          sampling.noisy() ? room(room_for(op.vocab)) : nullptr);
  });
  for (int64_t row = 0; row < op.rows; ++row) {
    op.status[row] = 0;
    op.tokens[row] =
        finish_choice(op.keys + row * op.chunks, op.flags + row * op.chunks, op.chunks, op.status[row]);
  }
}

}  // namespace beagle::cpu
