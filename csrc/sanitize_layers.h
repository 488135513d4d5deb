// The part of sanitize.cpp that drives decoder layers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/executor.h"
#include "sanitize.h"

namespace beagle {

// Layers of any sizes in buffers of exact size, with all or little of what a layer may have.
struct LayerCase {
  const int32_t dtype = below(3);
  const int64_t batch = below(4), nodes = below(9) ? below(12) : 40, kv_heads = 1 + below(2);
  const int64_t heads = kv_heads * (1 + below(3)), head = below(2) ? 1 + below(40) : 16, width = 1 + below(90);
  const int64_t inner = below(9) ? below(200) : 3000, slots = 1 + below(150), words = 1 + below(3);
  const int64_t rotary = 2 * below(int(head) / 2 + 1), pages = 1 + below(4), table_width = 1 + below(4);
  const bool paged = below(2), keys = below(4), of_output = below(2);
  std::vector<std::vector<uint16_t>> held;

  const void* floats(int64_t count, int32_t kind) {
    held.push_back(logits(count, kind));
    return held.back().data();
  }
  LinearWeight linear(int64_t outputs, int64_t inputs, bool there = true) {
    if (!there) return {};
    const bool exact = dtype == 0 && below(2);
    const int64_t gap = below(3), stride = inputs + gap;
    const void* weight = floats(std::max<int64_t>(outputs * stride - gap, 1), exact ? 2 : dtype);
    const void* bias = below(2) ? floats(outputs, dtype) : nullptr;
    return {weight, bias, nullptr, exact ? int32_t(kExact) : dtype, outputs, inputs, stride, 0};
  }
  NormWeight norm(int64_t size) {
    if (below(2)) return {};
    return {floats(size, dtype), 1e-5f, float(below(2))};
  }
  DecoderLayer layer(bool whole) {
    const bool kept = keys || !whole;
    DecoderLayer made{};
    static_cast<LayerParts&>(made) = {
        dtype, width, heads, kv_heads, head, linear(heads * head, width, whole), linear(kv_heads * head, width, kept),
        linear(kv_heads * head, width, kept), linear(width, heads * head, whole), linear(inner, width, whole),
        linear(inner, width, whole), linear(width, inner, whole), norm(width), norm(head), norm(head), norm(width),
        norm(width), norm(width), norm(width), norm(width), below(2), 0.5f, 0.3f, below(2) ? 2.0f : 0.0f, of_output, below(4) > 0};
    return made;
  }
};

// A number that fits, mostly; else one that no machine has room for.
inline int32_t wild(int most) { return below(3) ? int32_t(below(most)) : below(2) ? INT32_MIN + below(2) : INT32_MAX; }

inline void decoder_layers(int threads) {
  LayerCase one;
  const bool whole = below(5);
  const int64_t count = whole ? 1 + below(3) : 1, gap = below(3), row = one.head + gap;
  const int64_t planes = one.paged ? one.pages : one.batch, bytes = one.dtype == 0 ? 2 : 1;
  const int64_t rows = one.batch * one.nodes, all = planes * one.kv_heads * one.slots * row - gap;
  std::vector<int32_t> lengths, table, starts;
  std::vector<int64_t> mask;
  for (int64_t b = 0; b < one.batch; ++b) lengths.push_back(wild(int(one.slots) + 9));
  // a page of its own for each row, or none: rows that wrote to one page would race in any engine
  for (int64_t i = 0; i < one.batch * one.table_width; ++i) {
    const int64_t b = i / one.table_width;
    table.push_back(below(2) && b < one.pages && i % one.table_width == 0 ? int32_t(b) : below(2) ? -1 : INT32_MAX);
  }
  for (int64_t i = 0; i < rows * one.words; ++i) mask.push_back(int64_t(uint64_t(rng()) << 32 | rng()));
  for (int64_t i = 0; i < rows; ++i) starts.push_back(wild(int(one.slots) + 70));
  const auto x = logits(rows * one.width, one.dtype);
  const auto cos = logits(rows * one.rotary, one.dtype), sin = logits(rows * one.rotary, one.dtype);
  std::vector<uint16_t> out(size_t(rows * one.width * bytes));
  std::vector<std::vector<uint16_t>> cache;
  std::vector<DecoderLayer> layers;
  // sizes are alike, and so is which weights are in bf16
  const DecoderLayer first = one.layer(whole);
  for (int64_t i = 0; i < count; ++i) {
    layers.push_back(first);
    static_cast<NewTokens&>(layers.back()) = {
        x.data(), out.data(), one.batch, one.nodes, one.rotary, cos.data(), sin.data(), one.slots,
        one.paged ? table.data() : nullptr, one.paged ? one.table_width : 0, planes, lengths.data(), mask.data(),
        one.words, below(2) ? starts.data() : nullptr, below(3) ? 0 : below(90), below(4) ? 0 : 1 + below(40)};
    for (CachePlane* plane : {&layers.back().keys, &layers.back().values}) {
      cache.push_back(logits(std::max<int64_t>(all, 1), one.dtype));
      *plane = {cache.back().data(), one.kv_heads * one.slots * row, one.slots * row, row};
    }
  }
  cpu::decoder_layers(layers.data(), count, threads);
}

}  // namespace beagle
