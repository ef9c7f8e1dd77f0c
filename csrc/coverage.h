// One weighted k-median problem in exact arithmetic: choose k facilities so that sum_i min_{j chosen} cost[j][i] is least.
//
// cost = rint(weight_i * distance_ij * scale) with scale a power of two, kept in doubles that hold integers below 2^52.
// Every sum of them is exact, whatever its order, so that every path, machine and thread count decides alike, equal costs
// are equal, and a bound that says "no better" is a proof: for the rounded costs, which differ from the true ones by about
// 2^-52 * clients * (k + 1) of the largest. Where the best choice is so cheap beside the largest cost that this could decide
// (weights many orders of magnitude apart), sharpen() cuts the costs off and rounds them in finer steps.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "exact_scale.h"

namespace ampo {

struct Coverage {
  int64_t num_clients = 0;
  int64_t num_facilities = 0;
  std::vector<double> cost;  // [num_facilities, num_clients]
  double scale = 1.0;

  const double* of(int64_t facility) const { return cost.data() + facility * num_clients; }

  // In: weight_i * distance_ij. Out: integers, none dearer than `limit`; k bounds the sums that are taken of them.
  void round_costs(int64_t k, double limit = std::numeric_limits<double>::infinity());

  // Whether rounding could still decide among choices of k as cheap as `chosen` (`total`, rounded).
  bool is_coarse_at(double total) const { return is_coarse(total, double(num_clients)); }

  // Where it could: cuts the costs that `fill` writes anew off at what `chosen` costs, since no better choice holds a dearer
  // one, and rounds them in finer steps. True where that changed them, and the search should go on from `chosen`.
  bool sharpen(int64_t k, const std::vector<int64_t>& chosen, double total, const std::function<void()>& fill);

  double total(const std::vector<int64_t>& chosen) const;
};

// For every client its nearest chosen facility, by slot in `chosen`, its cost, and the cost of the next one.
struct Nearest {
  std::vector<double> first, second;
  std::vector<int64_t> slot;

  void compute(const Coverage& problem, const std::vector<int64_t>& chosen);
};

}  // namespace ampo
