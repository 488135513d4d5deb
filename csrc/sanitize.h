// What the drivers of sanitize.cpp share: random input, and comparing the CUDA executor with the host's.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "core/common.h"
#include "core/ops.h"
#include "emulator/emulator.h"

namespace beagle {

inline std::mt19937 rng(1);
inline int below(int n) { return int(rng() % uint32_t(n)); }

template <class T>
void same(const char* what, const std::vector<T>& host, const std::vector<T>& block, T slack = T(0)) {
  for (size_t i = 0; i < host.size(); ++i) {
    if (host[i] == block[i] || std::fabs(double(host[i]) - double(block[i])) <= double(slack)) continue;
    std::printf("%s[%zu]: %g on the host, %g in a block\n", what, i, double(host[i]), double(block[i]));
    emulator::fail("the executors differ");
  }
}

struct Outcome {
  std::vector<int32_t> path, accepted, status;
  std::vector<int64_t> next;
  Outcome(int64_t batch, int64_t length)
      : path(size_t(batch * length)), accepted(size_t(batch)), status(size_t(batch)), next(size_t(batch)) {}
  Verdict verdict() { return {path.data(), accepted.data(), next.data(), status.data()}; }
  void check(const char* op, const Outcome& block) const {
    same(op, path, block.path), same(op, accepted, block.accepted), same(op, status, block.status);
    same(op, next, block.next);
  }
};

struct SamplingData {
  std::vector<int64_t> seed, positions;
  std::vector<float> temperature, top_p, min_p;
  std::vector<int32_t> top_k;
  explicit SamplingData(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      seed.push_back(int64_t(rng()) << 20), positions.push_back(below(1000));
      temperature.push_back(float(below(3)) * 0.6f), top_k.push_back(below(3) * 7);
      top_p.push_back(below(2) ? 1.0f : 0.8f), min_p.push_back(below(2) ? 0.0f : 0.05f);
    }
  }
  Sampling pointers() const {
    return {seed.data(), temperature.data(), top_k.data(), top_p.data(), min_p.data()};
  }
};

// Logits of any dtype as raw bits: normal numbers, with a few infinities and NaNs; of float16 now and then any bits.
inline std::vector<uint16_t> logits(int64_t count, int dtype) {
  std::vector<uint16_t> bits(size_t(count * (dtype == 0 ? 2 : 1)));
  std::normal_distribution<float> normal(0, 3);
  const bool wild = below(2);
  for (int64_t i = 0; i < count; ++i) {
    const float z = below(500) ? normal(rng) : below(2) ? -kInf : kInf - kInf;
    if (dtype == 0) __builtin_memcpy(&bits[size_t(2 * i)], &z, 4);
    if (dtype == 1) bits[size_t(i)] = wild ? uint16_t(rng()) : narrow<Half>(z).bits;
    if (dtype == 2) bits[size_t(i)] = uint16_t(bit_cast<uint32_t>(z) >> 16);
  }
  return bits;
}

}  // namespace beagle
