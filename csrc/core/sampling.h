// A row's choice from those of its chunks.
#pragma once

#include "common.h"

namespace beagle {

// The row's token from its chunks' keys; status gains their flags.
BEAGLE_FN int64_t finish_choice(const uint64_t* keys, const int32_t* flags, int64_t chunks, int32_t& status) {
  uint64_t best = 0;
  for (int64_t c = 0; c < chunks; ++c) best = most(best, keys[c]), status |= flags[c];
  if (best == 0) status |= kStatusNoFinite;
  return best == 0 ? 0 : int64_t(key_index(best));
}

}  // namespace beagle
