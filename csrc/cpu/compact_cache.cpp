#include "../core/cache.h"

#include "executor.h"
#include "pool.h"

namespace beagle::cpu {
namespace {

// Wide units keep the steps of one head close in time: each slot is a cache miss of its own.
struct Line { char bytes[64]; };
struct Lines { char bytes[256]; };

void move_head(const CompactCache& op, int64_t b, char* head) {
  int64_t column = 0;
  for (; column + int64_t(sizeof(Lines)) <= op.width; column += sizeof(Lines)) move_column<Lines>(op, b, head, column);
  for (; column + int64_t(sizeof(Line)) <= op.width; column += sizeof(Line)) move_column<Line>(op, b, head, column);
  for (; column + 8 <= op.width; column += 8) move_column<uint64_t>(op, b, head, column);
  for (; column < op.width; ++column) move_column<char>(op, b, head, column);
}

}  // namespace

void compact_cache(const CompactCache& op, int threads) {
  int64_t moves = 0;
  for (int64_t b = 0; b < op.batch; ++b) {
    const int64_t steps = least<int64_t>(int64_t(op.num_accepted[b]) + 1, op.path_length);
    for (int64_t i = 0; i < steps; ++i) moves += op.path[b * op.path_length + i] > i;
  }
  // below a quarter megabyte a second thread costs more than it saves
  const int64_t bytes = moves * op.layers * op.planes * op.heads * op.width;
  parallel(op.layers * op.planes, bytes < 1 << 18 ? 1 : threads, [&](int64_t task) {
    char* plane = op.cache + task / op.planes * op.stride_layer + task % op.planes * op.stride_plane;
    for (int64_t b = 0; b < op.batch; ++b)
      for (int64_t h = 0; h < op.heads; ++h) move_head(op, b, plane + h * op.stride_head);
  });
}

}  // namespace beagle::cpu
