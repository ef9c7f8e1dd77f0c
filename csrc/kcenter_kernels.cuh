// One step of pool k-center per launch. The next center is found on the device, so the host launches k times and never waits.
#pragma once

#include <cstdint>

#include "cuda_block.cuh"

namespace ampo {

struct Farthest {
  float squared;  // to the nearest chosen point; -1 for a chosen point
  int64_t index;
};

struct PoolArgs {
  const void* points;  // [count, dim] row-major
  int64_t count, dim;
  float* nearest;     // [count] squared distance to the nearest chosen point
  int64_t* chosen;    // [k]; the first num_seeds are given
  Farthest* partial;  // [2, num_blocks] the farthest point of each block, of this step and of the one before
  int64_t num_seeds;
  int num_blocks;
};

struct PoolShared {
  Farthest best[kThreads];
  // the center's `dim` floats follow
};

// Ties to the lowest index.
__device__ inline Farthest farther(const Farthest& a, const Farthest& b) {
  return b.squared > a.squared || (b.squared == a.squared && b.index < a.index) ? b : a;
}

__device__ inline Farthest farthest_of_block(PoolShared& shared, const Farthest& mine) {
  shared.best[threadIdx.x] = mine;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (int(threadIdx.x) < width) {
      shared.best[threadIdx.x] = farther(shared.best[threadIdx.x], shared.best[threadIdx.x + width]);
    }
    __syncthreads();
  }
  const Farthest best = shared.best[0];
  __syncthreads();
  return best;
}

// chosen[step]: given for a seed, else the farthest point that the step before found.
__device__ inline int64_t center_of_step(const PoolArgs& args, int64_t step, PoolShared& shared) {
  if (step < args.num_seeds) return args.chosen[step];
  const Farthest* previous = args.partial + ((step - 1) % 2) * args.num_blocks;
  Farthest mine = {-2.0f, INT64_MAX};
  for (int b = threadIdx.x; b < args.num_blocks; b += kThreads) mine = farther(mine, previous[b]);
  const int64_t center = farthest_of_block(shared, mine).index;
  if (blockIdx.x == 0 && threadIdx.x == 0) args.chosen[step] = center;
  return center;
}

// Covers the pool by chosen[step] and leaves each block's farthest point; the last step of all only writes chosen[step].
// A warp reads one row at a time, kWidth neighbours a thread.
template <typename Raw, int kWidth>
__global__ void pool_step(PoolArgs args, int64_t step, bool is_last) {
  AMPO_SHARED(PoolShared, shared);
  float* center = reinterpret_cast<float*>(&shared + 1);
  const int64_t index = center_of_step(args, step, shared);
  if (is_last) return;
  const Raw* points = static_cast<const Raw*>(args.points);
  for (int64_t d = threadIdx.x; d < args.dim; d += kThreads) center[d] = as_float(points[index * args.dim + d]);
  __syncthreads();
  const int64_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = kThreads / kWarp;
  Farthest best = {-2.0f, INT64_MAX};
  // Every warp of a block makes the same number of rounds.
  for (int64_t begin = int64_t(blockIdx.x) * warps; begin < args.count; begin += int64_t(args.num_blocks) * warps) {
    const int64_t i = begin + warp;
    float sum = 0.0f;
    for (int64_t d = lane * kWidth; i < args.count && d < args.dim; d += kWarp * kWidth) {
      const Chunk<Raw, kWidth> part = *reinterpret_cast<const Chunk<Raw, kWidth>*>(points + i * args.dim + d);
      for (int e = 0; e < kWidth; ++e) {
        const float difference = as_float(part.value[e]) - center[d + e];
        sum = fmaf(difference, difference, sum);
      }
    }
    sum = warp_sum(sum);
    if (i >= args.count || lane != 0) continue;
    const float before = step == 0 ? INFINITY : args.nearest[i];
    const float now = i == index ? -1.0f : fminf(before, sum);
    args.nearest[i] = now;
    best = farther(best, {now, i});
  }
  const Farthest block_best = farthest_of_block(shared, best);
  if (threadIdx.x == 0) args.partial[(step % 2) * args.num_blocks + blockIdx.x] = block_best;
}

}  // namespace ampo
