#include "kmedoids.h"

#include <algorithm>
#include <limits>

namespace ampo {
namespace {

double gain_of(const Coverage& problem, const std::vector<double>& nearest, int64_t facility) {
  const double* cost = problem.of(facility);
  double gain = 0.0;
  for (int64_t i = 0; i < problem.num_clients; ++i) gain += std::max(0.0, nearest[i] - cost[i]);
  return gain;
}

void cover(const Coverage& problem, int64_t facility, std::vector<double>& nearest) {
  const double* cost = problem.of(facility);
  for (int64_t i = 0; i < problem.num_clients; ++i) nearest[i] = std::min(nearest[i], cost[i]);
}

int64_t cheapest_alone(const Coverage& problem) {
  int64_t best = 0;
  double best_cost = std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < problem.num_facilities; ++j) {
    double cost = 0.0;
    for (int64_t i = 0; i < problem.num_clients; ++i) cost += problem.of(j)[i];
    if (cost < best_cost) {
      best_cost = cost;
      best = j;
    }
  }
  return best;
}

struct Swap {
  double change;
  size_t slot;
};

// The best removal for facility `in`: its change is gain(in) + loss(removal), from one pass over the clients.
Swap best_swap(const Coverage& problem, const Nearest& nearest, const std::vector<double>& removal_loss,
               const std::vector<int64_t>& chosen, size_t num_fixed, int64_t in, std::vector<double>& change) {
  const double* cost = problem.of(in);
  change = removal_loss;
  double shared = 0.0;
  for (int64_t i = 0; i < problem.num_clients; ++i) {
    const double first = nearest.first[i], second = nearest.second[i];
    shared += std::min(cost[i] - first, 0.0);
    change[nearest.slot[i]] += std::max(first, std::min(cost[i], second)) - second;
  }
  Swap best{std::numeric_limits<double>::infinity(), num_fixed};
  for (size_t s = num_fixed; s < chosen.size(); ++s) {
    if (change[s] < best.change || (change[s] == best.change && chosen[s] < chosen[best.slot])) best = {change[s], s};
  }
  best.change += shared;
  return best;
}

void losses(const Nearest& nearest, size_t num_chosen, std::vector<double>& removal_loss) {
  removal_loss.assign(num_chosen, 0.0);
  for (size_t i = 0; i < nearest.slot.size(); ++i) removal_loss[nearest.slot[i]] += nearest.second[i] - nearest.first[i];
}

}  // namespace

std::vector<int64_t> greedy_facilities(const Coverage& problem, int64_t k, const std::vector<int64_t>& fixed) {
  std::vector<int64_t> chosen = fixed;
  if (chosen.empty() && k > 0) chosen.push_back(cheapest_alone(problem));
  std::vector<double> nearest(problem.num_clients, std::numeric_limits<double>::infinity());
  for (const int64_t j : chosen) cover(problem, j, nearest);
  std::vector<double> gain(problem.num_facilities, std::numeric_limits<double>::infinity());
  std::vector<int64_t> computed_at(problem.num_facilities, -1);
  for (const int64_t j : chosen) gain[j] = -1.0;  // never again
  while (int64_t(chosen.size()) < k) {
    const int64_t best = std::max_element(gain.begin(), gain.end()) - gain.begin();
    if (computed_at[best] == int64_t(chosen.size())) {
      chosen.push_back(best);
      cover(problem, best, nearest);
      gain[best] = -1.0;
    } else {
      gain[best] = gain_of(problem, nearest, best);
      computed_at[best] = int64_t(chosen.size());
    }
  }
  return chosen;
}

double swap_facilities(const Coverage& problem, int64_t num_fixed, std::vector<int64_t>& chosen) {
  const size_t fixed = size_t(num_fixed);
  if (chosen.size() == fixed) return problem.total(chosen);
  if (chosen.size() == 1) {  // no second facility to fall back on: every swap is a fresh start
    chosen[0] = cheapest_alone(problem);
    return problem.total(chosen);
  }
  std::vector<uint8_t> is_chosen(problem.num_facilities, 0);
  for (const int64_t j : chosen) is_chosen[j] = 1;
  Nearest nearest;
  std::vector<double> removal_loss, change;
  nearest.compute(problem, chosen);
  losses(nearest, chosen.size(), removal_loss);
  int64_t without_swap = 0;
  for (int64_t in = 0; without_swap < problem.num_facilities; in = (in + 1) % problem.num_facilities) {
    ++without_swap;
    if (is_chosen[in]) continue;
    const Swap swap = best_swap(problem, nearest, removal_loss, chosen, fixed, in, change);
    if (!(swap.change < 0.0)) continue;  // NaN is no gain: distances beyond a double would be swapped for ever
    is_chosen[chosen[swap.slot]] = 0;
    is_chosen[in] = 1;
    chosen[swap.slot] = in;
    nearest.compute(problem, chosen);
    losses(nearest, chosen.size(), removal_loss);
    without_swap = 0;
  }
  return problem.total(chosen);
}

}  // namespace ampo
