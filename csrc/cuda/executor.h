// The CUDA executor: each op launches on the stream given and returns.
#pragma once

#include <string>

#include "../core/ops.h"

namespace beagle::cuda {

void choose_tokens(const ChooseTokens& op, void* stream);
void perturb_logits(const PerturbLogits& op, void* stream);
void adjust_logits(const AdjustLogits& op, void* stream);
void top_candidates(const TopCandidates& op, void* stream);
void build_tree(const BuildTree& op, void* stream);
void join_branch(const JoinBranch& op, void* stream);
void lookup(const Lookup& op, void* stream);
void accept_tree(const AcceptTree& op, void* stream);
void verify_tree(const VerifyTree& op, void* stream);
void verify_chain(const VerifyChain& op, void* stream);
void compact_cache(const CompactCache& op, void* stream);

// Why the device cannot run this binary, which was built for `archs`; empty if it can.
std::string why_not(int device, const std::string& archs);

}  // namespace beagle::cuda
