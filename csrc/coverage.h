// One weighted k-median problem in exact arithmetic: choose k facilities so that sum_i min_{j chosen} cost[j][i] is least.
//
// cost = rint(weight_i * distance_ij * scale) with scale a power of two, kept in doubles that hold integers below 2^52.
// Every sum of them is exact, whatever its order, so that every path, machine and thread count decides alike, equal costs
// are equal, and a bound that says "no better" is a proof (for costs rounded to about 2^-52 * clients * (k + 1) of the
// largest, far below the resolution of the float32 distances they come from).
#pragma once

#include <cstdint>
#include <vector>

#include "exact_scale.h"

namespace ampo {

struct Coverage {
  int64_t num_clients = 0;
  int64_t num_facilities = 0;
  std::vector<double> cost;  // [num_facilities, num_clients]

  const double* of(int64_t facility) const { return cost.data() + facility * num_clients; }

  // In: weight_i * distance_ij. Out: integers; k bounds the sums that are taken of them.
  // Returns the scale.
  double round_costs(int64_t k);

  double total(const std::vector<int64_t>& chosen) const;
};

// For every client its nearest chosen facility, by slot in `chosen`, its cost, and the cost of the next one.
struct Nearest {
  std::vector<double> first, second;
  std::vector<int64_t> slot;

  void compute(const Coverage& problem, const std::vector<int64_t>& chosen);
};

}  // namespace ampo
