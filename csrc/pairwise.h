// All distances within each of many ragged groups of points.
#pragma once

#include <cstdint>

#include "points.h"

namespace ampo {

enum class Metric { kEuclidean, kSquared, kCosine };

// offsets [num_groups + 1] int64, offsets[0] = 0, offsets[num_groups] = points.count
// out     for each group one [N, N] block, the blocks one after the other: float32, or float64 for float64 points
//
// Cosine is 1 - cos as half the squared distance of the unit rows, so near-duplicates keep their digits; a row of zeros
// is at 1 from every other row and at 0 from other rows of zeros.
void pairwise_cpu(const Points& points, Metric metric, const int64_t* offsets, int64_t num_groups, void* out);

// The same on a device for float32 and bfloat16 points: points.data and out are device pointers, offsets lie on the host,
// `stream` is a cudaStream_t. Does not wait.
void pairwise_cuda(const Points& points, Metric metric, const int64_t* offsets, int64_t num_groups, float* out, void* stream);

// The [N, N] block of rows given by pointers; the matrix is symmetric, its diagonal 0.
template <typename T, typename Out>
void pairwise_rows(const T* const* rows, int64_t count, int64_t dim, Metric metric, Out* out);

}  // namespace ampo
