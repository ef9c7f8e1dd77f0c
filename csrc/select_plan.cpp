#include "select_plan.h"

#include <algorithm>

#include "first_error.h"
#include "select_group.h"

namespace ampo {
namespace {

std::vector<int64_t> chosen_without_distances(const Group& sides, Strategy strategy, int64_t group) {
  if (int64_t(sides.eligible_.size()) == sides.k_) return sides.eligible_;
  return strategy == Strategy::kRandom ? sides.random_choice(group) : sides.lowest(sides.eligible_, sides.k_);
}

void fill_group(Group& sides, const SelectOptions& options, int64_t g, SelectPlan& plan) {
  if (!sides.take(g)) return;
  const int64_t begin = sides.begin_;
  plan.group[g] = {begin, sides.shift_, int32_t(sides.count_), int32_t(sides.k_), int32_t(sides.eligible_.size()),
                   int32_t(sides.clients_.size())};
  std::copy(sides.positives_.begin(), sides.positives_.end(), plan.positive.begin() + g * options.num_positives);
  std::copy(sides.eligible_.begin(), sides.eligible_.end(), plan.eligible.begin() + begin);
  std::copy(sides.clients_.begin(), sides.clients_.end(), plan.client.begin() + begin);
  std::copy(sides.weight_.begin(), sides.weight_.end(), plan.weight.begin() + begin);
  const std::vector<int64_t> chosen = chosen_without_distances(sides, options.strategy, g);
  for (size_t s = 0; s < chosen.size(); ++s) {
    const auto place = std::lower_bound(sides.eligible_.begin(), sides.eligible_.end(), chosen[s]);
    plan.given[g * options.k + int64_t(s)] = int16_t(place - sides.eligible_.begin());
  }
}

}  // namespace

SelectPlan::SelectPlan(const SelectInput& input, const SelectOptions& options)
    : group(input.num_groups), eligible(input.points.count), client(input.points.count),
      given(input.num_groups * options.k, -1), weight(input.points.count),
      positive(input.num_groups * options.num_positives, -1) {
  strategy = options.strategy == Strategy::kKCenter     ? DeviceStrategy::kKCenter
             : options.strategy == Strategy::kOptSelect ? DeviceStrategy::kOptSelect
                                                        : DeviceStrategy::kGiven;
  for (int64_t g = 0; g < input.num_groups; ++g) largest = std::max(largest, input.offsets[g + 1] - input.offsets[g]);
  FirstError error;
#pragma omp parallel
  {
    Group sides(input, options);
#pragma omp for schedule(static)
    for (int64_t g = 0; g < input.num_groups; ++g) error.keep([&] { fill_group(sides, options, g, *this); });
  }
  error.rethrow();
}

}  // namespace ampo
