// What the host decides for the device before one launch: the sides, the weights, and choices that need no distances.
#pragma once

#include <cstdint>
#include <vector>

#include "select.h"

namespace ampo {

enum class DeviceStrategy : int { kGiven, kKCenter, kOptSelect };

struct GroupPlan {
  int64_t begin;  // of the group's points, and of its entries in `eligible`, `client` and `weight`
  double shift;
  int32_t count, k, num_eligible, num_clients;  // k = 0: degenerate
};

struct SelectPlan {
  SelectPlan(const SelectInput& input, const SelectOptions& options);

  std::vector<GroupPlan> group;
  std::vector<int16_t> eligible, client;  // [n] local indices, ascending
  std::vector<int16_t> given;  // [num_groups, k] places in `eligible`: the choice, or where a search starts; -1 fills
  std::vector<double> weight;     // [n] of the clients
  std::vector<int64_t> positive;  // [num_groups, num_positives], -1 fills
  DeviceStrategy strategy;
  int64_t largest = 0;  // size of a group
};

}  // namespace ampo
