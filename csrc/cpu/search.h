// Perturbed choices in one row of logits: groups of 64 tokens in the order of what each may reach at most, so that nearly
// all of them need no noise but a bound of their largest.
#pragma once

#include "../core/filters.h"
#include "scan.h"

namespace beagle::cpu {

// Bounds of the noise of `count` groups from `first`, an even one, on; written up to the next multiple of 16.
BEAGLE_OWN void noise_bounds(const Stream& stream, int64_t first, int64_t count, float* noise) {
  constexpr int kPairs = kLanes;
  const Stream of_groups = stream.of_groups();
  for (int64_t u = 0; u < count; u += 2 * kPairs) {
    alignas(64) uint32_t pair[kPairs], x[4][kPairs], word[2 * kPairs];
    for (int p = 0; p < kPairs; ++p) pair[p] = uint32_t((first + u) / 2 + p);
    philox(of_groups, pair, x);
    for (int p = 0; p < kPairs; ++p) word[2 * p] = x[0][p], word[2 * p + 1] = x[2][p];
    const int groups = int(least<int64_t>((count - u + kLanes - 1) / kLanes, 2)) * kLanes;
    for (int l = 0; l < groups; ++l) noise[u + l] = noise_bound(word[l]);
  }
}

// Bounds of groups that have not been looked into, with their numbers.
struct Frontier {
  float* bound;
  int32_t* group;
  int64_t count;

  // Numbers the groups from 0 on, and makes the count a multiple of 16.
  BEAGLE_FN void start() {
    for (int64_t u = 0; u < count; ++u) group[u] = int32_t(u);
    pad();
  }
  BEAGLE_FN void pad() {
    for (; count % kLanes != 0; ++count) bound[count] = -kInf;
  }
  // Leaves those that reach `low`.
  BEAGLE_FN void keep(float low) {
    int64_t kept = 0;
    for (int64_t u = 0; u < count; u += kLanes) {
      const Reals x = lanes_at(bound + u);
      const uint32_t lanes = bits_of((x >= low) & (x > -kInf));
      store_marked(group + u, lanes, group + kept);
      kept += store_marked(bound + u, lanes, bound + kept);
    }
    count = kept;
    pad();
  }
};

// Looks into the groups whose bound is at least `least()`, the highest bound first, until none is left.
template <class Least, class Look>
BEAGLE_FN void search(Frontier frontier, const Least& least, const Look& look) {
  frontier.start();
  for (uint32_t looks = 1; frontier.count > 0; ++looks) {
    const int64_t at = index_of_largest(frontier.bound, frontier.count);
    if (frontier.bound[at] == -kInf || frontier.bound[at] < least()) return;
    frontier.bound[at] = -kInf;
    BEAGLE_COUNT(kLooks, 1);
    look(int64_t(frontier.group[at]));
    // now and then, ever more seldom, those that are still to be looked into are gathered
    if ((looks & (looks - 1)) == 0) frontier.keep(least());
  }
}

// Calls offer(j, noise) for the members of a group whose `value` (what they have without noise) may reach `least()`; one
// that is NaN reaches nothing. The group's noise is at most `roof`.
template <class Least, class Offer>
BEAGLE_FN void look_into(const float (&value)[kGroup], float scale, const Stream& stream, uint32_t group, float roof,
                         const Least& least, const Offer& offer) {
  constexpr int kQuads = kGroup / 4, kFew = 3;
  const Group drawn(stream, group);
  const float low = least();
  uint64_t near = 0;
  for (int v = 0; v < kGroup; v += kLanes) near |= uint64_t(bits_of(lanes_at(value + v) + scale * roof >= low)) << v;
  if (__builtin_popcountll(near) <= kFew) {
    for (; near; near &= near - 1) {
      const int j = __builtin_ctzll(near);
      const uint32_t token = group * kGroup + uint32_t(j);
      offer(j, drawn.noise(token, philox_word(stream, token)));
    }
    return;
  }
  alignas(64) uint32_t quad[kQuads], x[4][kQuads], word[kGroup];
  alignas(64) float reach[kGroup];
  for (int q = 0; q < kQuads; ++q) quad[q] = group * kQuads + uint32_t(q);
  philox(stream, quad, x);
  for (int q = 0; q < kQuads; ++q)
    for (int w = 0; w < 4; ++w) word[4 * q + w] = x[w][q];
  const int holder = int(drawn.holder % kGroup);
  if (near >> holder & 1) offer(holder, -log_of(drawn.least));
  for (int j = 0; j < kGroup; ++j) reach[j] = value[j] + token_bound(word[j]) * scale;
  reach[holder] = -kInf;
  for_lanes(reach, least(), [&](int j) BEAGLE_INLINED { offer(j, -log_of(drawn.least + exponential(word[j]))); });
}

// Floats of room that a row of so many tokens needs.
constexpr int64_t kSurvivors = 4096;
BEAGLE_FN int64_t room_for(int64_t tokens) { return 4 * ((tokens / kGroup + kLanes) / kLanes * kLanes) + kSurvivors; }

// Part [begin, end) of a row that is sampled at T > 0; begin lies at an even group.
template <class T>
struct Part {
  const T* row;
  int64_t begin, end, count, padded;
  Stream stream;
  float temperature;
  float *tops, *noise, *bound, *survivors;
  int32_t* number;
  int32_t status = 0;

  BEAGLE_FN Part(const T* row, int64_t begin, int64_t end, const Stream& stream, float temperature, float* room)
      : row(row), begin(begin), end(end), count((end - begin + kGroup - 1) / kGroup),
        padded((count + kLanes - 1) / kLanes * kLanes), stream(stream), temperature(temperature), tops(room),
        noise(tops + padded), bound(noise + padded), survivors(bound + 2 * padded),
        number(reinterpret_cast<int32_t*>(bound + padded)) {
    for (int64_t u = count; u < padded; ++u) tops[u] = -kInf;
  }
  BEAGLE_FN void read() {
    if (group_tops(row, begin, end, tops)) status = kStatusNan;
  }
  // The same, and what bounds the groups' noise: by turns, so that one computes while the other waits for memory.
  BEAGLE_FN void read_and_draw() {
    constexpr int64_t kTurn = 2 * kLanes;
    for (int64_t u = 0; u < count; u += kTurn) {
      noise_bounds(stream, begin / kGroup + u, least(kTurn, count - u), noise + u);
      if (group_tops(row, first(u), least(first(u + kTurn), end), tops + u)) status = kStatusNan;
    }
  }
  BEAGLE_FN float top() const { return largest(tops, padded); }
  BEAGLE_FN Frontier frontier() const { return {bound, number, padded}; }
  BEAGLE_FN int64_t first(int64_t u) const { return begin + u * kGroup; }

  // Bounds of the groups with a logit above `low` and of at least `kth`.
  BEAGLE_FN void set_bounds(float low, float kth) {
    for (int64_t u = 0; u < padded; ++u) {
      const float reach = tops[u] + temperature * noise[u];
      bound[u] = tops[u] > low && tops[u] >= kth ? reach : -kInf;
    }
  }
};

// Key of the best z + T g among the logits above `low`, of at least `kth`, that `keeps` takes; 0 if there is none. `logit`
// is its z.
template <class T, class Keeps>
BEAGLE_OWN uint64_t choose_above(Part<T>& given, float low, float kth, const Keeps& keeps, float& logit) {
  Part<T> part = given;  // nobody else's, so that it may stay in registers
  part.set_bounds(low, kth);
  uint64_t best = 0;
  const float t = part.temperature;
  const auto least = [&]() BEAGLE_INLINED { return best ? reach_of(key_value(best), t) : -kInf; };
  search(part.frontier(), least, [&](int64_t u) BEAGLE_INLINED {
    alignas(64) float z[kGroup];
    const int64_t first = part.first(u);
    load_group(part.row, first, part.end, z);
    look_into(z, t, part.stream, uint32_t(first / kGroup), part.noise[u], least, [&](int j, float g) BEAGLE_INLINED {
      const float x = tidy(z[j]);
      if (!(x > low && keeps(x))) return;
      const uint64_t key = make_key(x + t * g, uint32_t(first + j));
      if (key > best) best = key, logit = x;
    });
  });
  return best;
}

struct All {
  BEAGLE_FN bool operator()(float) const { return true; }
};

}  // namespace beagle::cpu
