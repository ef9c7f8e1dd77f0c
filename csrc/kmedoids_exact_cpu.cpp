#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kmedoids.h"

namespace ampo {
namespace {

constexpr int kRootRounds = 400;
constexpr int kNodeRounds = 60;

enum State : uint8_t { kFree, kIn, kOut };

// Lagrangian: with prices lambda_i for serving client i, any k facilities cost at least
//   sum_i lambda_i + sum of the k smallest rho_j,   rho_j = sum_i min(0, c_ij - lambda_i),
// facilities that must be in counted first and those that are out left out. Prices are kept integer, so the bound is exact.
class Search {
 public:
  Search(const Coverage& problem, int64_t k, int64_t num_fixed, std::vector<int64_t>& chosen,
         const std::function<bool()>& is_late)
      : problem_(problem), k_(k), best_(chosen), best_cost_(problem.total(chosen)), is_late_(is_late),
        rho_(problem.num_facilities) {
    state_.assign(problem.num_facilities, kFree);
    for (int64_t s = 0; s < num_fixed; ++s) state_[chosen[s]] = kIn;
  }

  ExactResult run() {
    std::vector<double> price(problem_.num_clients);
    Nearest nearest;
    nearest.compute(problem_, best_);
    for (int64_t i = 0; i < problem_.num_clients; ++i) price[i] = k_ > 1 ? nearest.second[i] : nearest.first[i];
    const double bound = std::min(std::max(0.0, explore(price, kRootRounds)), enough());
    return {bound, bound >= enough()};
  }

 private:
  // What a bound has to reach. Rounded prices rarely reach the best cost itself, and symmetric points would never be done;
  // 2^-26 of it is less than float32 distances can tell.
  double enough() const { return best_cost_ - std::floor(std::ldexp(best_cost_, -26)); }

  // Returns a bound that holds for every choice below this node that costs less than enough().
  double explore(std::vector<double> price, int rounds) {
    double bound = raise_bound(price, rounds);
    std::vector<int64_t> decided;
    if (bound < enough() && !late_) bound = std::max(bound, branch(price, bound, decided));
    for (const int64_t j : decided) state_[j] = kFree;
    return bound;
  }

  double branch(const std::vector<double>& price, double bound, std::vector<int64_t>& decided) {
    evaluate(price);
    fix_by_reduced_cost(bound, decided);
    const int64_t num_in = std::count(state_.begin(), state_.end(), kIn);
    const int64_t num_free = std::count(state_.begin(), state_.end(), kFree);
    if (num_in > k_ || num_in + num_free < k_) return best_cost_;
    if (num_in == k_ || num_in + num_free == k_) return leaf(num_in == k_);
    // The free facility that the bound leans on most: without it the bound rises soonest.
    int64_t pick = -1;
    for (int64_t j = 0; j < problem_.num_facilities; ++j) {
      if (state_[j] == kFree && (pick < 0 || rho_[j] < rho_[pick])) pick = j;
    }
    state_[pick] = kIn;
    const double with = explore(price, kNodeRounds);
    state_[pick] = kOut;
    const double without = late_ ? bound : explore(price, kNodeRounds);
    state_[pick] = kFree;
    return std::min(with, without);
  }

  double leaf(bool only_in) {
    std::vector<int64_t> all;
    for (int64_t j = 0; j < problem_.num_facilities; ++j) {
      if (state_[j] == kIn || (!only_in && state_[j] == kFree)) all.push_back(j);
    }
    offer(all);
    return best_cost_;
  }

  void offer(const std::vector<int64_t>& facilities) {
    const double cost = problem_.total(facilities);
    if (cost < best_cost_) {
      best_cost_ = cost;
      best_ = facilities;
    }
  }

  // rho_, the k facilities of the relaxed optimum in open_, and its value.
  double evaluate(const std::vector<double>& price) {
    const int64_t n = problem_.num_clients;
    double value = std::accumulate(price.begin(), price.end(), 0.0);
    open_.clear();
    free_.clear();
    for (int64_t j = 0; j < problem_.num_facilities; ++j) {
      if (state_[j] == kOut) continue;
      const double* cost = problem_.of(j);
      double rho = 0.0;
      for (int64_t i = 0; i < n; ++i) rho += std::min(0.0, cost[i] - price[i]);
      rho_[j] = rho;
      (state_[j] == kIn ? open_ : free_).push_back(j);
    }
    const int64_t missing = std::min<int64_t>(k_ - int64_t(open_.size()), int64_t(free_.size()));
    if (missing > 0) {
      const auto lower = [this](int64_t a, int64_t b) { return rho_[a] != rho_[b] ? rho_[a] < rho_[b] : a < b; };
      std::partial_sort(free_.begin(), free_.begin() + missing, free_.end(), lower);
      open_.insert(open_.end(), free_.begin(), free_.begin() + missing);
    }
    for (const int64_t j : open_) value += rho_[j];
    return value;
  }

  // Subgradient steps on the prices; leaves in `price` the best ones. Each relaxed optimum is also offered as a solution.
  double raise_bound(std::vector<double>& price, int rounds) {
    const int64_t n = problem_.num_clients;
    std::vector<double> current = price, direction(n, 0.0), slack(n);
    double best_bound = -std::numeric_limits<double>::infinity(), length = 1.5;
    int without_gain = 0;
    for (int round = 0; round < rounds; ++round) {
      if (late_ || (late_ = is_late_())) break;
      const double bound = evaluate(current);
      if (bound > best_bound) {
        if (bound > best_bound + 1e-4 * (best_cost_ - best_bound)) without_gain = 0;
        best_bound = bound;
        price = current;
      }
      if (int64_t(open_.size()) == k_) offer(open_);
      if (best_bound >= enough()) break;
      if (++without_gain > 12) {
        without_gain = 0;
        length /= 2.0;
        current = price;
        std::fill(direction.begin(), direction.end(), 0.0);
        if (length < 0.02) break;
        continue;
      }
      step(current, direction, slack, length * (best_cost_ - bound));
    }
    return best_bound;
  }

  void step(std::vector<double>& price, std::vector<double>& direction, std::vector<double>& slack, double size) const {
    const int64_t n = problem_.num_clients;
    std::fill(slack.begin(), slack.end(), 1.0);  // 1 - how many open facilities would serve the client
    for (const int64_t j : open_) {
      const double* cost = problem_.of(j);
      for (int64_t i = 0; i < n; ++i) slack[i] -= cost[i] < price[i] ? 1.0 : 0.0;
    }
    double norm = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      direction[i] = slack[i] + 0.5 * direction[i];
      norm += direction[i] * direction[i];
    }
    if (norm == 0.0) return;
    const double top = 4503599627370496.0 / double(n * (k_ + 1));  // keeps every sum below 2^52
    for (int64_t i = 0; i < n; ++i) {
      price[i] = std::min(top, std::max(0.0, std::nearbyint(price[i] + size / norm * direction[i])));
    }
  }

  // A facility whose forced opening (or closing) lifts the bound to the best cost can be decided for all of this node.
  void fix_by_reduced_cost(double bound, std::vector<int64_t>& decided) {
    std::vector<uint8_t> is_open(problem_.num_facilities, 0);
    double last_open = -std::numeric_limits<double>::infinity(), first_closed = std::numeric_limits<double>::infinity();
    for (const int64_t j : open_) {
      is_open[j] = 1;
      if (state_[j] == kFree) last_open = std::max(last_open, rho_[j]);
    }
    for (int64_t j = 0; j < problem_.num_facilities; ++j) {
      if (state_[j] == kFree && !is_open[j]) first_closed = std::min(first_closed, rho_[j]);
    }
    for (int64_t j = 0; j < problem_.num_facilities; ++j) {
      if (state_[j] != kFree) continue;
      const double lift = is_open[j] ? first_closed - rho_[j] : rho_[j] - last_open;
      if (bound + lift < enough()) continue;
      state_[j] = is_open[j] ? kIn : kOut;
      decided.push_back(j);
    }
  }

  const Coverage& problem_;
  const int64_t k_;
  std::vector<int64_t>& best_;
  double best_cost_;
  const std::function<bool()>& is_late_;
  std::vector<uint8_t> state_;
  std::vector<double> rho_;
  std::vector<int64_t> open_, free_;
  bool late_ = false;
};

}  // namespace

ExactResult best_facilities(const Coverage& problem, int64_t k, int64_t num_fixed, std::vector<int64_t>& chosen,
                            const std::function<bool()>& is_late) {
  return Search(problem, k, num_fixed, chosen, is_late).run();
}

}  // namespace ampo
