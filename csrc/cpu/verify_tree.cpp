// The tree is walked from its root: a node is looked at only if the choices above it lead there.
#include "../core/accept.h"
#include "../core/sampling.h"

#include <vector>

#include "executor.h"
#include "pool.h"
#include "rows.h"

namespace beagle::cpu {
namespace {

constexpr int64_t kNotChosen = INT64_MIN;  // what no token is

struct Node {
  int64_t b;
  int32_t n;
};

// Chunk `chunk` of the choice at a node.
void choose(const VerifyTree& op, const Node& node, int64_t chunk) {
  const Tree& tree = op.tree;
  const int64_t row = node.b * tree.nodes + node.n, task = row * op.chunks + chunk;
  const RowSampling sampling = op.sampling.at(node.b);
  const Stream stream(sampling.seed, op.positions[node.b] + (node.n > 0 ? tree.depth[row] : 0), kTarget, 0);
  const void* logits = row_at(op.logits, op.dtype, row_offset(node.b, node.n, op.stride_b, op.stride_n));
  op.flags[task] = 0;
  op.keys[task] = rows().choose[op.dtype](logits, op.vocab, chunk, op.chunks, sampling, stream, op.flags[task],
                                          sampling.noisy() ? room(room_for(op.vocab)) : nullptr);
}

struct Choices {
  explicit Choices(const VerifyTree& op)
      : op(op), chosen(size_t(op.batch * op.tree.nodes), kNotChosen), status(chosen.size(), 0) {}

  // The children of a node that equal its choice, which is known now: several where a token was drafted twice.
  void follow(const Node& node, std::vector<Node>& next) {
    const Tree& tree = op.tree;
    const int64_t first = node.b * tree.nodes, row = first + node.n, at = row * op.chunks;
    chosen[row] = finish_choice(op.keys + at, op.flags + at, op.chunks, status[row]);
    const int32_t size = least(tree.size[node.b], tree.nodes);
    for (int32_t n = node.n + 1; n < size; ++n)
      if (tree.parents[first + n] == node.n && tree.tokens[first + n] == chosen[row]) next.push_back({node.b, n});
  }

  void accept(int64_t b) {
    const int64_t first = b * op.tree.nodes;
    Thread team;
    uint64_t match[kMaxWords];
    const auto status_of = [&](int32_t n) { return status[first + n]; };
    beagle::accept_tree(team, op.tree, b, &chosen[first], status_of, op.verdict, match);
  }

  const VerifyTree& op;
  std::vector<int64_t> chosen;
  std::vector<int32_t> status;
};

}  // namespace

void verify_tree(const VerifyTree& op, int threads) {
  Choices choices(op);
  std::vector<Node> level, next;
  for (int64_t b = 0; b < op.batch; ++b) level.push_back({b, 0});
  while (!level.empty()) {
    parallel(int64_t(level.size()) * op.chunks, threads,
             [&](int64_t task) { choose(op, level[task / op.chunks], task % op.chunks); });
    next.clear();
    for (const Node& node : level) choices.follow(node, next);
    level.swap(next);
  }
  for (int64_t b = 0; b < op.batch; ++b) choices.accept(b);
}

}  // namespace beagle::cpu
