// Greedy k-center over a pool: farthest first (Gonzalez 1985), streaming, no n x n matrix.
#pragma once

#include <cstdint>
#include <vector>

#include "points.h"

namespace ampo {

// Chooses k points: the seeds in their order, then each time the point with the largest squared distance to its nearest
// chosen one, ties to the lowest index; without seeds point 0 comes first. No index twice.
//
// The result is that of the plain loop, but a point is looked at again only while its last known distance, which can only
// have fallen since, could still make it the farthest (lazy greedy, Minoux 1978). The threads share the points.
// chosen [k] out; needs num_seeds <= k <= points.count.
void kcenter_cpu(const Points& points, int64_t k, const std::vector<int64_t>& seeds, int64_t* chosen);

// The same on a device, for float32 and bfloat16 points of at most kMaxPoolDim dimensions: points.data and chosen are device
// pointers, `stream` a cudaStream_t. One launch a step and no wait; a step reads every point (no lazy bounds here).
constexpr int64_t kMaxPoolDim = 8192;
void kcenter_cuda(const Points& points, int64_t k, const std::vector<int64_t>& seeds, int64_t* chosen, void* stream);

}  // namespace ampo
