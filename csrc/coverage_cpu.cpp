#include "coverage.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ampo {

void Coverage::round_costs(int64_t k, double limit) {
  const double largest = cost.empty() ? 0.0 : std::min(limit, *std::max_element(cost.begin(), cost.end()));
  scale = exact_scale(largest, double(num_clients) * double(k + 1));
  for (double& value : cost) value = std::nearbyint(std::min(value, limit) * scale);
}

bool Coverage::sharpen(int64_t k, const std::vector<int64_t>& chosen, double total, const std::function<void()>& fill) {
  if (!is_coarse_at(total)) return false;
  const double limit = cost_limit(total, double(num_clients), scale);
  if (!(exact_scale(limit, double(num_clients) * double(k + 1)) > scale)) return false;
  fill();
  const bool is_free = total == 0.0 && this->total(chosen) == 0.0;  // before rounding: nothing can be cheaper
  round_costs(k, limit);
  return !is_free;
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
