// One group's sides: who is positive, who may be chosen, who is covered and with what weight. The same for every path.
#pragma once

#include <cstdint>
#include <vector>

#include "select.h"

namespace ampo {

struct Group {
  Group(const SelectInput& input, const SelectOptions& options) : input_(input), options_(options) {}

  // Indices are local to the group. False where there is no positive or no negative.
  bool take(int64_t group);

  double reward(int64_t i) const { return input_.reward[begin_ + i]; }
  bool rises(int64_t a, int64_t b) const { return reward(a) != reward(b) ? reward(a) < reward(b) : a < b; }

  // The lowest rewards of `from`, ties by index, in that order.
  std::vector<int64_t> lowest(std::vector<int64_t> from, int64_t num) const;

  // k of the eligible, by the group's key.
  std::vector<int64_t> random_choice(int64_t group) const;

  // A weighted sum with what its weights lack; 0 stays 0 where the shift overflows.
  double shifted(double sum) const { return sum == 0.0 ? 0.0 : sum * shift_; }

  const SelectInput& input_;
  const SelectOptions& options_;
  int64_t begin_ = 0, count_ = 0, k_ = 0;
  std::vector<int64_t> valid_, positives_, eligible_, clients_;
  // exp(mean - r_i) = exp(lowest - r_i) * exp(mean - lowest): weight_, of the clients, never overflows and decides alone;
  // shift_ is the second factor.
  std::vector<double> weight_;
  double shift_ = 1.0;

 private:
  void take_sides();
  void weigh();
};

}  // namespace ampo
