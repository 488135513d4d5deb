// Cache compaction: one column of bytes of one head moves down its slots.
#pragma once

#include "ops.h"

namespace beagle {

// Byte offset of a row's slot within its layer, plane and head; -1 outside the cache or the block table.
BEAGLE_FN int64_t slot_offset(const CompactCache& op, int64_t b, int64_t slot) {
  if (slot < 0) return -1;
  if (!op.table) return slot < op.slots ? b * op.stride_batch + slot * op.stride_slot : -1;
  const int64_t entry = slot / op.slots;
  if (entry >= op.table_width) return -1;
  const int64_t page = op.table[b * op.table_width + entry];
  if (page < 0 || page >= op.pages) return -1;
  return page * op.stride_batch + slot % op.slots * op.stride_slot;
}

// Byte offsets of one step's source and place; place is -1 where nothing moves.
struct Move { int64_t source, place; };
constexpr int kMoves = 8;  // of a batch

// Accepted steps of a row, none where its length is wrong.
BEAGLE_FN int64_t steps_of(const CompactCache& op, int64_t b) {
  return op.lengths[b] < 0 ? 0 : least<int64_t>(int64_t(op.num_accepted[b]) + 1, op.path_length);
}

BEAGLE_FN Move move_of(const CompactCache& op, int64_t b, int64_t step, int64_t steps) {
  Move move{-1, -1};
  if (step >= steps) return move;
  const int64_t length = op.lengths[b], node = op.path[b * op.path_length + step];
  if (node <= step) return move;
  move.source = slot_offset(op, b, length + node);
  if (move.source >= 0) move.place = slot_offset(op, b, length + step);
  return move;
}

// Sources lie at or above their own step, so batches in order never read what was written; a batch is staged in
// registers before it is stored. `start` and what it moves by are multiples of kAlign.
template <class Unit, int kAlign>
BEAGLE_FN void move_batch(const Move* moves, char* start) {
  Unit staged[kMoves] = {};
  BEAGLE_UNROLL
  for (int i = 0; i < kMoves; ++i) {
    if (moves[i].place < 0) continue;
    __builtin_memcpy(&staged[i], __builtin_assume_aligned(start + moves[i].source, kAlign), sizeof(Unit));
  }
  BEAGLE_UNROLL
  for (int i = 0; i < kMoves; ++i) {
    if (moves[i].place < 0) continue;
    __builtin_memcpy(__builtin_assume_aligned(start + moves[i].place, kAlign), &staged[i], sizeof(Unit));
  }
}

// Moves bytes [column, column + sizeof(Unit)) of every accepted slot.
template <class Unit>
BEAGLE_FN void move_column(const CompactCache& op, int64_t b, char* head, int64_t column) {
  const int64_t steps = steps_of(op, b);
  for (int64_t first = 0; first < steps; first += kMoves) {
    Move moves[kMoves];
    for (int i = 0; i < kMoves; ++i) moves[i] = move_of(op, b, first + i, steps);
    move_batch<Unit, 1>(moves, head + column);
  }
}

}  // namespace beagle
