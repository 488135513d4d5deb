// sanitize.cpp's texts that are looked up in, and chains that join candidates: of any sizes, with any values in them.
#pragma once

#include "sanitize.h"

#include "cpu/executor.h"
#include "cuda/executor.h"

namespace beagle {

// Texts of few tokens, or that repeat themselves, with placeholders; rows further apart than they are long.
inline void lookups(int threads, bool blocks, bool many) {
  const int64_t batch = below(5), size = many ? 9000 + below(9000) : below(2) ? below(40) : below(700);
  const int64_t stride = size + below(3);
  const int32_t count = below(65), longest = below(3) ? 1 + below(20) : 1 + below(1024);
  std::vector<int64_t> text(size_t(batch ? (batch - 1) * stride + size : 0));
  const int vocab = 1 + below(3), period = 1 + below(50);
  for (size_t i = 0; i < text.size(); ++i) {
    text[i] = i < size_t(period) || !below(30) ? below(vocab) : text[i - size_t(period)];
    if (!below(200)) text[i] = -1 - below(2);
  }
  std::vector<int32_t> lengths, matched[2];
  for (int64_t b = 0; b < batch; ++b) {
    lengths.push_back(below(4) ? below(int(size) + 1) : below(2) ? INT32_MIN : INT32_MAX);
  }
  std::vector<int64_t> tokens[2];
  for (const bool block : {false, true}) {
    tokens[block].assign(size_t(batch * count), 7), matched[block].assign(size_t(batch), 7);
    const Lookup op{text.data(), lengths.data(), stride, batch, size, count, longest, tokens[block].data(),
                    matched[block].data()};
    if (!block) cpu::lookup(op, threads);
    else if (blocks) cuda::lookup(op, nullptr);
  }
  if (blocks) same("lookup", tokens[0], tokens[1]), same("lookup matched", matched[0], matched[1]);
}

// Parents of any value among sound ones; chains with placeholders and scores that are no numbers.
inline void joins(int threads, bool blocks, bool many) {
  const int64_t batch = 1 + below(20);
  const int32_t count = many ? 900 + below(900) : below(60), steps = below(12), columns = count + steps;
  const auto score = [] { return below(20) ? -float(below(9)) : below(2) ? -kInf : kInf - kInf; };
  std::vector<int64_t> tokens, branch, out_tokens[2];
  std::vector<float> scores, bounds, out_scores[2];
  std::vector<int32_t> parents, out_parents[2];
  for (int64_t i = 0; i < batch * count; ++i) {
    const int32_t here = int32_t(i % count);
    parents.push_back(below(60) ? below(least(here + 1, 5)) - 1 : below(3) ? below(2000) - 1000 : INT32_MAX);
    tokens.push_back(below(3)), scores.push_back(score());
  }
  for (int64_t i = 0; i < batch * steps; ++i) branch.push_back(below(30) ? below(3) : -1), bounds.push_back(score());
  for (const bool block : {false, true}) {
    const size_t all = size_t(batch * columns);
    out_tokens[block].assign(all, 7), out_scores[block].assign(all, 7), out_parents[block].assign(all, 7);
    const JoinBranch op{tokens.data(), scores.data(), parents.data(), branch.data(), bounds.data(), batch, count, steps,
                        out_tokens[block].data(), out_scores[block].data(), out_parents[block].data()};
    if (!block) cpu::join_branch(op, threads);
    else if (blocks) cuda::join_branch(op, nullptr);
  }
  if (!blocks) return;
  same("join_branch", out_tokens[0], out_tokens[1]), same("join_branch parents", out_parents[0], out_parents[1]);
  // a NaN that was given equals itself as bits alone
  for (auto& each : out_scores) for (float& x : each) x = x != x ? 99.0f : x;
  same("join_branch scores", out_scores[0], out_scores[1]);
}

}  // namespace beagle
