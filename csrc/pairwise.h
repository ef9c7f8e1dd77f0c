// Pairwise Euclidean distances of ragged groups of points.
#pragma once

#include <cstdint>

namespace ampo {

// points  [n, dim] float32, row-major, the groups one after the other
// offsets [num_groups + 1] int64, offsets[0] = 0, offsets[num_groups] = n
// out     for each group one [N, N] float32 block, the blocks one after the other (sum of N * N entries)
//
// Differences are squared, not inner products subtracted: points 1e-4 apart at norm 100 keep their digits, the diagonal
// is exactly 0, and the result is symmetric bit for bit. Sums run in float64; the order does not depend on the threads.
void pairwise_cpu(const float* points, int64_t dim, const int64_t* offsets, int64_t num_groups, float* out);

}  // namespace ampo
