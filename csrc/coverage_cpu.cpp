#include "coverage.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ampo {

double Coverage::round_costs(int64_t k) {
  const double largest = cost.empty() ? 0.0 : *std::max_element(cost.begin(), cost.end());
  const double scale = exact_scale(largest, double(num_clients) * double(k + 1));
  for (double& value : cost) value = std::nearbyint(value * scale);
  return scale;
}

double Coverage::total(const std::vector<int64_t>& chosen) const {
  double sum = 0.0;
  for (int64_t i = 0; i < num_clients; ++i) {
    double nearest = std::numeric_limits<double>::infinity();
    for (const int64_t j : chosen) nearest = std::min(nearest, of(j)[i]);
    sum += nearest;
  }
  return sum;
}

void Nearest::compute(const Coverage& problem, const std::vector<int64_t>& chosen) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  first.assign(problem.num_clients, kNone);
  second.assign(problem.num_clients, kNone);
  slot.assign(problem.num_clients, 0);
  for (size_t s = 0; s < chosen.size(); ++s) {
    const double* cost = problem.of(chosen[s]);
    for (int64_t i = 0; i < problem.num_clients; ++i) {
      const bool closer = cost[i] < first[i];
      second[i] = closer ? first[i] : std::min(second[i], cost[i]);
      slot[i] = closer ? int64_t(s) : slot[i];
      first[i] = closer ? cost[i] : first[i];
    }
  }
}

}  // namespace ampo
