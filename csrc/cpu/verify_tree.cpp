#include "../core/accept.h"
#include "../core/sampling.h"
#include "executor.h"
#include "pool.h"
#include "rows.h"

namespace beagle::cpu {
namespace {

void accept_row(const VerifyTree& op, int64_t b) {
  const Tree& tree = op.tree;
  const int32_t size = least(most(tree.size[b], 1), tree.nodes);
  int64_t chosen[kMaxNodes];
  int32_t status = 0;
  for (int32_t n = 0; n < size; ++n) {
    const int64_t at = (b * tree.nodes + n) * op.chunks;
    chosen[n] = finish_choice(op.keys + at, op.flags + at, op.chunks, status);
  }
  Thread team;
  uint64_t match[kMaxWords];
  beagle::accept_tree(team, tree, b, chosen, status, op.verdict, match);
}

}  // namespace

void verify_tree(const VerifyTree& op, int threads) {
  const Tree& tree = op.tree;
  const auto choose = rows().choose[op.dtype];
  parallel(op.batch * tree.nodes * op.chunks, threads, [&](int64_t task) {
    const int64_t row = task / op.chunks, b = row / tree.nodes, n = row % tree.nodes;
    if (n > 0 && n >= tree.size[b]) return;
    const RowSampling sampling = op.sampling.at(b);
    const Stream stream(sampling.seed, op.positions[b] + (n > 0 ? tree.depth[row] : 0), kTarget, 0);
    const void* logits = row_at(op.logits, op.dtype, row_offset(b, n, op.stride_b, op.stride_n));
    op.flags[task] = 0;
    op.keys[task] = choose(logits, op.vocab, task % op.chunks, op.chunks, sampling, stream, op.flags[task],
                          sampling.noisy() ? room(room_for(op.vocab)) : nullptr);
  });
  for (int64_t b = 0; b < op.batch; ++b) accept_row(op, b);
}

}  // namespace beagle::cpu
