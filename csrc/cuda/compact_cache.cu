// One launch: a thread for each (row, layer, plane, head, column), the columns fastest so that a warp's bytes join.
#include "../core/cache.h"

#include "executor.h"
#include "team.cuh"

namespace beagle::cuda {
namespace {

template <class Unit>
__global__ void __launch_bounds__(kThreads) move_columns(const CompactCache op) {
  __shared__ Move moves[kThreads];
  const int64_t columns = op.width / int64_t(sizeof(Unit)), heads = op.layers * op.planes * op.heads;
  const int64_t b = blockIdx.y, steps = steps_of(op, b);
  for (int64_t first = 0; first < steps; first += kThreads) {
    __syncthreads();
    moves[threadIdx.x] = move_of(op, b, first + threadIdx.x, steps);
    __syncthreads();
    const int count = int(least<int64_t>(steps - first, kThreads));
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < heads * columns;
         i += int64_t(gridDim.x) * kThreads) {
      const int64_t column = i % columns, head = i / columns % op.heads, plane = i / columns / op.heads;
      char* start = op.cache + plane / op.planes * op.stride_layer + plane % op.planes * op.stride_plane +
                    head * op.stride_head;
      for (int step = 0; step < count; step += kMoves) {
        move_batch<Unit, alignof(Unit)>(moves + step, start + column * int64_t(sizeof(Unit)));
      }
    }
  }
}

struct alignas(16) Sixteen { uint64_t words[2]; };

template <class Unit>
void move(const CompactCache& op, void* stream) {
  const int64_t work = op.layers * op.planes * op.heads * (op.width / int64_t(sizeof(Unit)));
  const int64_t blocks = least<int64_t>((work + kThreads - 1) / kThreads, 1 << 20);
  launch(move_columns<Unit>, dim3(blocks, op.batch), stream, op);
}

}  // namespace

void compact_cache(const CompactCache& op, void* stream) {
  const int64_t alignment = reinterpret_cast<int64_t>(op.cache) | op.width | op.stride_layer | op.stride_plane |
                            op.stride_batch | op.stride_head | op.stride_slot;
  if (alignment % 16 == 0) move<Sixteen>(op, stream);
  else if (alignment % 4 == 0) move<uint32_t>(op, stream);
  else move<char>(op, stream);
}

}  // namespace beagle::cuda
