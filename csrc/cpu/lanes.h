// Vectors of fp32 and sums over their lanes, whatever the instruction set; always inlined, since files that are compiled
// once for each of them include it.
#pragma once

#include "../core/common.h"

#include <utility>

namespace beagle::cpu {

// Unaligned, and free to alias floats; the compiler maps it to what the machine has.
template <int kLanes>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
};
template <int kLanes>
using Floats = typename Vector<kLanes>::Floats;

// Lane i of fold's first or second operand.
template <int kLanes, int kRun>
constexpr int source(int i, bool second) {
  return i / kRun / 2 * 2 * kRun + i % kRun + i / kRun % 2 * kLanes + (second ? kRun : 0);
}

// Of two vectors, each of sums in runs of 2 kRun lanes: one vector of the same sums in runs of kRun, theirs in turns.
template <int kLanes, int kRun, int... kLane>
BEAGLE_FN Floats<kLanes> fold(Floats<kLanes> a, Floats<kLanes> b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source<kLanes, kRun>(kLane, false)...) +
         __builtin_shufflevector(a, b, source<kLanes, kRun>(kLane, true)...);
#else
  using Ints = typename Vector<kLanes>::Ints;
  return __builtin_shuffle(a, b, Ints{source<kLanes, kRun>(kLane, false)...}) +
         __builtin_shuffle(a, b, Ints{source<kLanes, kRun>(kLane, true)...});
#endif
}

// The sums of kCount vectors, a power of two: vector j's is left in the first one's lane j kLanes / kCount, all lanes
// added in one order whatever kCount is.
template <int kLanes, int kCount, int kRun = kLanes / 2>
BEAGLE_FN void add_lanes(Floats<kLanes>* sum) {
  constexpr int kHalf = kCount > 1 ? kCount / 2 : 1;
#pragma GCC unroll 8
  for (int j = 0; j < kHalf; ++j)
    sum[j] = fold<kLanes, kRun>(sum[j], sum[kCount > 1 ? j + kHalf : j], std::make_integer_sequence<int, kLanes>());
  if constexpr (kRun > 1) add_lanes<kLanes, kHalf, kRun / 2>(sum);
}

}  // namespace beagle::cpu
