#include "kmedoids.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace ampo {
namespace {

struct Group {
  const float* distance;  // [count, count]
  const double* weight;
  const uint8_t* eligible;
  int64_t count;
};

double total_cost(const Group& group, const std::vector<int64_t>& chosen) {
  double sum = 0.0;
  for (int64_t i = 0; i < group.count; ++i) {
    if (group.weight[i] == 0.0) continue;
    float nearest = std::numeric_limits<float>::infinity();
    for (const int64_t j : chosen) nearest = std::min(nearest, group.distance[i * group.count + j]);
    sum += group.weight[i] * double(nearest);
  }
  return sum;
}

// For every client the distance to its nearest chosen point and to the nearest other one: a swap's cost is then one pass.
struct Nearest {
  std::vector<float> first, second;
  std::vector<int64_t> slot;

  Nearest(const Group& group, const std::vector<int64_t>& chosen)
      : first(group.count, std::numeric_limits<float>::infinity()), second(first), slot(group.count, -1) {
    for (int64_t i = 0; i < group.count; ++i) {
      for (size_t s = 0; s < chosen.size(); ++s) {
        const float d = group.distance[i * group.count + chosen[s]];
        if (d < first[i]) {
          second[i] = first[i];
          first[i] = d;
          slot[i] = int64_t(s);
        } else if (d < second[i]) {
          second[i] = d;
        }
      }
    }
  }
};

double swap_cost(const Group& group, const Nearest& nearest, int64_t out_slot, int64_t in) {
  double sum = 0.0;
  for (int64_t i = 0; i < group.count; ++i) {
    if (group.weight[i] == 0.0) continue;
    const float kept = nearest.slot[i] == out_slot ? nearest.second[i] : nearest.first[i];
    sum += group.weight[i] * double(std::min(kept, group.distance[i * group.count + in]));
  }
  return sum;
}

std::vector<int64_t> swapped(const std::vector<int64_t>& chosen, int64_t out_slot, int64_t in) {
  std::vector<int64_t> result = chosen;
  result[out_slot] = in;
  std::sort(result.begin(), result.end());
  return result;
}

double local_search(const Group& group, std::vector<int64_t>& chosen) {
  double cost = total_cost(group, chosen);
  while (true) {
    const Nearest nearest(group, chosen);
    double best_cost = std::numeric_limits<double>::infinity();
    std::vector<int64_t> best;
    for (int64_t in = 0; in < group.count; ++in) {
      if (!group.eligible[in] || std::binary_search(chosen.begin(), chosen.end(), in)) continue;
      for (size_t s = 0; s < chosen.size(); ++s) {
        const double candidate_cost = swap_cost(group, nearest, int64_t(s), in);
        if (candidate_cost > best_cost) continue;
        std::vector<int64_t> candidate = swapped(chosen, int64_t(s), in);
        if (candidate_cost < best_cost || candidate < best) {
          best_cost = candidate_cost;
          best = std::move(candidate);
        }
      }
    }
    if (best.empty() || best_cost >= cost - 1e-12 * std::max(cost, 1.0)) return cost;
    cost = best_cost;
    chosen = std::move(best);
  }
}

}  // namespace

void kmedoids_swap_cpu(const float* distances, const double* weights, const uint8_t* eligible, const int64_t* offsets,
                       int64_t num_groups, int64_t k, int64_t* chosen, double* cost) {
  std::vector<int64_t> block(num_groups + 1, 0);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t count = offsets[g + 1] - offsets[g];
    block[g + 1] = block[g] + count * count;
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t start = offsets[g];
    const Group group{distances + block[g], weights + start, eligible + start, offsets[g + 1] - start};
    int64_t* row = chosen + g * k;
    std::vector<int64_t> members(row, std::find(row, row + k, int64_t(-1)));
    std::sort(members.begin(), members.end());
    cost[g] = members.empty() ? std::numeric_limits<double>::quiet_NaN() : local_search(group, members);
    std::copy(members.begin(), members.end(), row);
  }
}

}  // namespace ampo
