// What the host decides for the device before one launch: the sides, the weights, and choices that need no distances.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "select_group.h"
#include "select_kernels.cuh"

namespace ampo {

struct SelectPlan {
  SelectPlan(const SelectInput& input, const SelectOptions& options)
      : group(input.num_groups), eligible(input.points.count), client(input.points.count), given(input.num_groups * options.k, -1),
        weight(input.points.count), positive(input.num_groups * options.num_positives, -1) {
    strategy = options.strategy == Strategy::kKCenter     ? DeviceStrategy::kKCenter
               : options.strategy == Strategy::kOptSelect ? DeviceStrategy::kOptSelect
                                                          : DeviceStrategy::kGiven;
    for (int64_t g = 0; g < input.num_groups; ++g) largest = std::max(largest, input.offsets[g + 1] - input.offsets[g]);
#pragma omp parallel
    {
      Group sides(input, options);
#pragma omp for schedule(static)
      for (int64_t g = 0; g < input.num_groups; ++g) fill(sides, options, g);
    }
  }

  std::vector<GroupPlan> group;
  std::vector<int16_t> eligible, client, given;
  std::vector<double> weight;
  std::vector<int64_t> positive;
  DeviceStrategy strategy;
  int64_t largest = 0;

 private:
  void fill(Group& sides, const SelectOptions& options, int64_t g) {
    group[g] = GroupPlan{};
    if (!sides.take(g)) return;
    const int64_t begin = sides.begin_;
    group[g] = {begin, sides.shift_, int32_t(sides.count_), int32_t(sides.k_), int32_t(sides.eligible_.size()),
                int32_t(sides.clients_.size())};
    std::copy(sides.positives_.begin(), sides.positives_.end(), positive.begin() + g * options.num_positives);
    std::copy(sides.eligible_.begin(), sides.eligible_.end(), eligible.begin() + begin);
    std::copy(sides.clients_.begin(), sides.clients_.end(), client.begin() + begin);
    std::copy(sides.weight_.begin(), sides.weight_.end(), weight.begin() + begin);
    const std::vector<int64_t> chosen =
        int64_t(sides.eligible_.size()) == sides.k_     ? sides.eligible_
        : options.strategy == Strategy::kRandom         ? sides.random_choice(g)
                                                        : sides.lowest(sides.eligible_, sides.k_);
    for (size_t s = 0; s < chosen.size(); ++s) {
      const auto place = std::lower_bound(sides.eligible_.begin(), sides.eligible_.end(), chosen[s]);
      given[g * options.k + int64_t(s)] = int16_t(place - sides.eligible_.begin());
    }
  }
};

}  // namespace ampo
