// k-means of a few points that needs only their distances.
#pragma once

#include <cstdint>
#include <vector>

#include "random.h"

namespace ampo {

// Lloyd's algorithm from a k-means++ start (Arthur & Vassilvitskii 2007). A point's squared distance to a cluster's mean
// follows from squared distances between points:
//   ||x - mean(C)||^2 = sum_{j in C} d2(x, j) / |C| - sum_{j, l in C} d2(j, l) / (2 |C|^2)
// so no mean is ever formed, and with d2 rounded to integers (exact_scale) all sums are exact: every path decides alike.
// An empty cluster takes the point farthest from its own mean among clusters of more than one (ties: lowest index); a point
// goes to the lowest of equally near clusters. With fewer than k distinct points there are fewer clusters.
//
// squared [count, count], symmetric. Returns each point's cluster; *num_clusters <= k.
std::vector<int64_t> kmeans_clusters(const double* squared, int64_t count, int64_t k, const Random& random,
                                     int64_t* num_clusters);

}  // namespace ampo
