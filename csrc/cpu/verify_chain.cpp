#include "executor.h"
#include "pool.h"
#include "rows.h"

namespace beagle::cpu {

void verify_chain(const VerifyChain& op, int threads) {
  const int64_t laws = 2 * op.steps + 1;
  parallel(op.batch * laws, threads, [&](int64_t task) {
    const int64_t b = task / laws, i = task % laws, d = i - op.steps - 1;
    const RowSampling sampling = op.sampling.at(b);
    const void* row = d < 0 ? row_at(op.target, op.dtype, row_offset(b, i, op.target_b, op.target_n))
                            : row_at(op.draft, op.dtype, row_offset(b, d, op.draft_b, op.draft_n));
    static_cast<Law*>(op.laws)[task] = rows().measure[op.dtype](row, d < 0 ? op.vocab : op.draft_vocab, sampling,
                                                                     room(room_for(most(op.vocab, op.draft_vocab))));
  });
  parallel(op.batch, threads, [&](int64_t b) { rows().chain[op.dtype](op, b, room(room_for(op.vocab))); });
}

}  // namespace beagle::cpu
