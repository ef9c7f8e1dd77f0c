#include "select_group.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "random.h"
#include "stable_exp.h"

namespace ampo {

bool Group::take(int64_t group) {
  begin_ = input_.offsets[group];
  count_ = input_.offsets[group + 1] - begin_;
  take_sides();
  if (positives_.empty() || eligible_.empty()) return false;
  k_ = std::min(options_.k, int64_t(eligible_.size()));
  weigh();
  return true;
}

void Group::take_sides() {
  valid_.clear();
  positives_.clear();
  eligible_.clear();
  clients_.clear();
  for (int64_t i = 0; i < count_; ++i) {
    if (!input_.valid[begin_ + i]) continue;
    valid_.push_back(i);
    if (input_.positive_ok[begin_ + i]) positives_.push_back(i);
  }
  const auto falls = [this](int64_t a, int64_t b) { return reward(a) != reward(b) ? reward(a) > reward(b) : a < b; };
  const int64_t num = std::min<int64_t>(options_.num_positives, int64_t(positives_.size()));
  std::partial_sort(positives_.begin(), positives_.begin() + num, positives_.end(), falls);
  positives_.resize(num);
  if (num == 0) return;
  const bool has_rule = !std::isnan(options_.tie_tol);
  const double limit = has_rule ? reward(positives_.back()) - options_.tie_tol : 0.0;
  for (const int64_t i : valid_) {
    const bool is_positive = std::find(positives_.begin(), positives_.end(), i) != positives_.end();
    if (!is_positive || options_.cover_positives) clients_.push_back(i);
    if (!is_positive && (!has_rule || reward(i) < limit)) eligible_.push_back(i);
  }
}

void Group::weigh() {
  double sum = 0.0, lowest = std::numeric_limits<double>::infinity();
  for (const int64_t i : valid_) {
    sum += reward(i);
    lowest = std::min(lowest, reward(i));
  }
  shift_ = stable_exp(sum / double(valid_.size()) - lowest);
  weight_.resize(clients_.size());
  for (size_t c = 0; c < clients_.size(); ++c) weight_[c] = stable_exp(lowest - reward(clients_[c]));
}

std::vector<int64_t> Group::lowest(std::vector<int64_t> from, int64_t num) const {
  std::partial_sort(from.begin(), from.begin() + num, from.end(), [this](int64_t a, int64_t b) { return rises(a, b); });
  from.resize(num);
  return from;
}

std::vector<int64_t> Group::random_choice(int64_t group) const {
  const Random random(options_.seed, uint64_t(input_.keys[group]), kRandomStrategy);
  std::vector<std::pair<uint64_t, int64_t>> ticket;
  for (const int64_t i : eligible_) ticket.emplace_back(random.bits(uint64_t(i)), i);
  std::partial_sort(ticket.begin(), ticket.begin() + k_, ticket.end());
  std::vector<int64_t> chosen;
  for (int64_t s = 0; s < k_; ++s) chosen.push_back(ticket[s].second);
  return chosen;
}

}  // namespace ampo
