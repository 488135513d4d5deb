// Cache compaction: one column of bytes of one head moves down its slots.
#pragma once

#include "ops.h"

namespace beagle {

// Byte offset of a row's slot within its layer, K or V, and head; -1 outside the cache or the block table.
BEAGLE_FN int64_t slot_offset(const CompactCache& op, int64_t b, int64_t slot) {
  if (slot < 0) return -1;
  if (!op.table) return slot < op.slots ? b * op.stride_batch + slot * op.stride_slot : -1;
  const int64_t entry = slot / op.slots;
  if (entry >= op.table_width) return -1;
  const int64_t page = op.table[b * op.table_width + entry];
  if (page < 0 || page >= op.pages) return -1;
  return page * op.stride_batch + slot % op.slots * op.stride_slot;
}

// Moves bytes [column, column + sizeof(Unit)) of every accepted slot. Sources lie at or above their own step, so steps
// in order never read what was written; a batch is staged in registers before it is stored.
template <class Unit>
BEAGLE_FN void move_column(const CompactCache& op, int64_t b, char* plane, int64_t column) {
  constexpr int kBatch = 8;
  const int64_t length = op.lengths[b], steps = least<int64_t>(int64_t(op.num_accepted[b]) + 1, op.path_length);
  if (length < 0) return;
  const int32_t* path = op.path + b * op.path_length;
  for (int64_t first = 0; first < steps; first += kBatch) {
    Unit staged[kBatch] = {};
    int64_t to[kBatch];
    BEAGLE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int64_t step = first + i;
      to[i] = -1;
      if (step >= steps || path[step] <= step) continue;
      const int64_t from = slot_offset(op, b, length + path[step]);
      to[i] = from < 0 ? -1 : slot_offset(op, b, length + step);
      if (to[i] >= 0) __builtin_memcpy(&staged[i], plane + from + column, sizeof(Unit));
    }
    BEAGLE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (to[i] >= 0) __builtin_memcpy(plane + to[i] + column, &staged[i], sizeof(Unit));
    }
  }
}

}  // namespace beagle
