// The part of sanitize.cpp that drives adjust_logits.
#pragma once

#include <cstdint>

#include "cpu/executor.h"
#include "cuda/executor.h"
#include "sanitize.h"

namespace beagle {

// Rows in buffers of exact size, of few different tokens, so that much repeats; now and then lengths, tokens, ids and
// settings that make no sense.
struct AdjustCase {
  const bool large, wild = below(4) == 0;
  const int32_t dtype = below(3);
  const int64_t batch = 1 + below(3), nodes = 1 + below(4), width = 1 + below(large ? 20000 : 200), room = below(7);
  const int64_t slots = below(3) ? below(90) : large ? 700 : 0, gap = below(3), vocab = width + (below(2) ? 0 : 40);
  const int64_t count = below(3) * 4, longest = below(5), words = (vocab + 31) / 32, chunks = 1 + below(4);
  const bool reduced = vocab > width || below(2);
  std::vector<int64_t> paths, text, phrases, ids;
  std::vector<int32_t> lengths, prompts, first, rows, ngram, allowed;
  std::vector<float> added, bias, repetition, frequency, presence;

  explicit AdjustCase(bool large) : large(large) {
    for (int64_t i = 0; i < batch * slots; ++i) text.push_back(token());
    for (int64_t i = 0; i < batch * nodes; ++i)
      for (int64_t j = 0, pad = below(int(room) + 1); j < room; ++j) paths.push_back(j < pad ? -1 : token());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pad = longest ? below(int(longest)) : 0;
      for (int64_t j = 0; j < longest; ++j) phrases.push_back(j < pad ? -1 : token());
      bias.push_back(real()), rows.push_back(below(int(batch) + 2) - 1);
    }
    for (int64_t i = 0; i < width; ++i) ids.push_back(i + (vocab > width && i > width / 2 ? 40 : 0));
    for (int64_t i = 0; i < batch * vocab; ++i) added.push_back(real()), first.push_back(below(9) - 4);
    for (int64_t i = 0; i < batch * nodes * words; ++i) allowed.push_back(below(3) ? -1 : int32_t(rng()));
    for (int64_t b = 0; b < batch; ++b) {
      lengths.push_back(wild ? int32_t(rng()) : below(int(slots) + 1));
      prompts.push_back(wild ? int32_t(rng()) : below(lengths.back() + 1));
      repetition.push_back(below(2) ? 1.0f : 1.3f), frequency.push_back(below(2) ? 0.0f : 0.2f);
      presence.push_back(below(2) ? 0.0f : -0.3f), ngram.push_back(wild ? int32_t(rng()) : below(5));
    }
  }
  int64_t token() const { return wild && below(9) == 0 ? int64_t(uint64_t(rng()) << 32 | rng()) : below(6); }
  static float real() { return below(9) ? float(below(100)) * 0.01f : -kInf; }
};

inline void adjustments(int threads, bool blocks) {
  const AdjustCase one(blocks);
  const int64_t row = one.width + one.gap, tables = below(4);
  const auto z = logits(one.batch * one.nodes * row - one.gap, one.dtype);
  std::vector<float> out[2];
  for (const bool block : {false, true}) {
    if (block && !blocks) continue;
    out[block].assign(size_t(one.batch * one.nodes * one.width), 0);
    std::vector<uint32_t> counts(size_t(block ? one.batch * one.width : 0));
    std::vector<int32_t> sizes(size_t(one.batch)), listed(one.text.size()), places(one.paths.size());
    const AdjustLogits op{z.data(), one.dtype, one.batch, one.nodes, one.width, one.nodes * row, row, one.paths.data(),
                          one.room, one.text.data(), one.slots, one.lengths.data(), one.prompts.data(),
                          tables & 1 ? one.added.data() : nullptr, tables & 2 ? one.first.data() : nullptr, one.vocab,
                          one.phrases.data(), one.bias.data(), one.rows.data(), one.count, one.longest,
                          one.repetition.data(), one.frequency.data(), one.presence.data(), one.ngram.data(),
                          one.reduced ? one.ids.data() : nullptr, tables ? one.allowed.data() : nullptr,
                          tables ? one.words : 0, one.chunks, counts.data(), sizes.data(), listed.data(),
                          places.data(), out[block].data()};
    if (block) cuda::adjust_logits(op, nullptr);
    else cpu::adjust_logits(op, threads);
    for (float& value : out[block]) value = value == value ? value == -kInf ? -1e30f : value : 1e30f;
  }
  if (blocks) same("adjust_logits", out[0], out[1]);
}

}  // namespace beagle
