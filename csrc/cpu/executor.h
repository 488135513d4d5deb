// The host executor: one function an op, `threads` at most.
#pragma once

#include "../core/layer_ops.h"

namespace beagle::cpu {

void choose_tokens(const ChooseTokens& op, int threads);
void perturb_logits(const PerturbLogits& op, int threads);
void adjust_logits(const AdjustLogits& op, int threads);
void top_candidates(const TopCandidates& op, int threads);
void build_tree(const BuildTree& op, int threads);
void join_branch(const JoinBranch& op, int threads);
void lookup(const Lookup& op, int threads);
void accept_tree(const AcceptTree& op, int threads);
void verify_tree(const VerifyTree& op, int threads);
void verify_chain(const VerifyChain& op, int threads);
void compact_cache(const CompactCache& op, int threads);
// on the host alone: a GPU has the Triton kernel, and matrix products of its own
void tree_attention(const TreeAttention& op, int threads);
void skinny_linear(const SkinnyLinear& op, int threads);
// Layers of equal sizes, the first of which reads x, and each writes `out`.
void decoder_layers(const DecoderLayer* ops, int64_t count, int threads);
void int8_linear(const Int8Linear& op, int threads);

}  // namespace beagle::cpu
