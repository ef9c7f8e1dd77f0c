#include "select.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "coverage.h"
#include "distance_kernels.h"
#include "first_error.h"
#include "kmeans.h"
#include "kmedoids.h"
#include "pairwise.h"
#include "random.h"
#include "select_group.h"

namespace ampo {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// A swap's local optimum costs at most 5 times the optimum, so a fifth of it is a lower bound.
constexpr double kSwapRatio = 5.0;

using Clock = std::chrono::steady_clock;

// Shares what is left of the time among the groups that are left: an easy group leaves its time to the others. And asks the
// caller, in the caller's own thread, whether it still wants an answer.
class Deadline {
 public:
  Deadline(double limit_s, int64_t num_groups, int num_threads, const std::function<bool()>& is_unwanted)
      : is_unwanted_(is_unwanted), asked_at_(Clock::now()), unfinished_(num_groups), has_limit_(limit_s < kInfinity),
        threads_(num_threads), left_(num_groups),
        end_(Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                std::chrono::duration<double>(has_limit_ ? std::clamp(limit_s, 0.0, 1e8) : 0.0))) {}

  bool has_limit() const { return has_limit_; }

  bool is_stopped() {
    if (!is_unwanted_ || std::this_thread::get_id() != caller_ || is_stopped_) return is_stopped_;
    const Clock::time_point now = Clock::now();
    if (now - asked_at_ < kBetweenQuestions) return false;
    asked_at_ = now;
    return is_stopped_ = is_unwanted_();
  }

  void group_done() { unfinished_.fetch_sub(1); }

  // The caller's thread goes on asking while the others work on the last groups.
  void wait_for_others() {
    if (!is_unwanted_ || std::this_thread::get_id() != caller_) return;
    while (unfinished_ > 0 && !is_stopped()) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }

  Clock::time_point next_group() {
    const int64_t left = std::max<int64_t>(1, left_.fetch_sub(1));
    const Clock::time_point now = Clock::now();
    return now + std::min(end_ - now, (end_ - now) * std::min<int64_t>(threads_, left) / left);
  }

 private:
  static constexpr std::chrono::milliseconds kBetweenQuestions{50};

  const std::function<bool()>& is_unwanted_;
  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point asked_at_;
  std::atomic<bool> is_stopped_ = false;
  std::atomic<int64_t> unfinished_;
  const bool has_limit_;
  const int64_t threads_;
  std::atomic<int64_t> left_;
  const Clock::time_point end_;
};

template <typename T>
class Selector : Group {
 public:
  Selector(const SelectInput& input, const SelectOptions& options, Deadline& deadline)
      : Group(input, options), deadline_(deadline) {}

  void run(int64_t group, const SelectOutput& out) {
    int64_t* positive = out.positive + group * options_.num_positives;
    int64_t* negative = out.negative + group * options_.k;
    std::fill(positive, positive + options_.num_positives, -1);
    std::fill(negative, negative + options_.k, -1);
    out.cost[group] = out.lower_bound[group] = kNan;
    out.proven[group] = 0;
    if (!take(group)) return;
    rows_.take(input_.points, begin_, count_);
    bound_ = 0.0;
    has_distances_ = false;
    std::vector<int64_t> chosen = int64_t(eligible_.size()) == k_ ? eligible_ : choose(group);
    std::sort(chosen.begin(), chosen.end());
    std::copy(positives_.begin(), positives_.end(), positive);
    std::copy(chosen.begin(), chosen.end(), negative);
    const double cost = cost_of(chosen);
    // The only choice there is, or one that was proven: the optimum.
    const bool is_known = int64_t(eligible_.size()) == k_ || is_optimal_;
    const double bound = is_known ? kInfinity : shifted(bound_);
    out.cost[group] = cost;
    out.lower_bound[group] = std::min(bound, cost);
    out.proven[group] = bound >= cost && (is_known || !has_lost_);
    is_optimal_ = false;
  }

 private:
  double cost_of(const std::vector<int64_t>& chosen) {
    double cost = 0.0;
    const std::vector<double> nearest = has_distances_ ? nearest_in_matrix(chosen) : nearest_from_rows(chosen);
    has_lost_ = false;
    for (size_t c = 0; c < clients_.size(); ++c) {
      cost += weight_[c] * nearest[c];
      has_lost_ |= weight_[c] == 0.0 && nearest[c] > 0.0;
    }
    return shifted(cost);
  }

  // Both give the same bits: the matrix holds the square roots of the same squared distances.
  std::vector<double> nearest_in_matrix(const std::vector<int64_t>& chosen) const {
    std::vector<double> nearest;
    for (const int64_t i : clients_) {
      const double* row = matrix_.data() + place_[i] * int64_t(valid_.size());
      double least = kInfinity;
      for (const int64_t j : chosen) least = std::min(least, row[place_[j]]);
      nearest.push_back(least);
    }
    return nearest;
  }

  std::vector<double> nearest_from_rows(const std::vector<int64_t>& chosen) const {
    std::vector<const T*> columns;
    for (const int64_t j : chosen) columns.push_back(rows_.row[j]);
    std::vector<T> squared(chosen.size());
    std::vector<double> nearest;
    for (const int64_t i : clients_) {
      squared_to_many(rows_.row[i], columns.data(), int64_t(columns.size()), input_.points.dim, squared.data());
      nearest.push_back(double(std::sqrt(*std::min_element(squared.begin(), squared.end()))));
    }
    return nearest;
  }

  std::vector<int64_t> choose(int64_t group) {
    switch (options_.strategy) {
      case Strategy::kRandom: return random_choice(group);
      case Strategy::kKCenter: return farthest_first();
      case Strategy::kCoreset: return coreset(Random(options_.seed, uint64_t(input_.keys[group]), kKmeansStart));
      case Strategy::kOptSelect: return opt_select(false);
      case Strategy::kOptSelectExact: return opt_select(true);
      default: return lowest(eligible_, k_);
    }
  }

  std::vector<int64_t> farthest_first() {
    const int64_t num = int64_t(eligible_.size());
    std::vector<const T*> others;
    for (const int64_t i : eligible_) others.push_back(rows_.row[i]);
    std::vector<T> nearest(num, std::numeric_limits<T>::infinity()), squared(num);
    std::vector<uint8_t> is_chosen(num, 0);
    const auto cover = [&](const T* row) {
      squared_to_many(row, others.data(), num, input_.points.dim, squared.data());
      for (int64_t i = 0; i < num; ++i) nearest[i] = std::min(nearest[i], squared[i]);
    };
    for (const int64_t i : positives_) cover(rows_.row[i]);
    std::vector<int64_t> chosen;
    while (int64_t(chosen.size()) < k_) {
      int64_t best = -1;
      for (int64_t i = 0; i < num; ++i) {
        if (!is_chosen[i] && (best < 0 || nearest[i] > nearest[best])) best = i;
      }
      is_chosen[best] = 1;
      chosen.push_back(eligible_[best]);
      cover(others[best]);
    }
    return chosen;
  }

  void fill_matrix(const std::vector<int64_t>& members, Metric metric) {
    std::vector<const T*> rows;
    for (const int64_t i : members) rows.push_back(rows_.row[i]);
    matrix_.resize(members.size() * members.size());
    pairwise_rows(rows.data(), int64_t(rows.size()), input_.points.dim, metric, matrix_.data());
  }

  std::vector<int64_t> coreset(const Random& random) {
    fill_matrix(eligible_, Metric::kSquared);
    int64_t num_clusters = 0;
    const int64_t num = int64_t(eligible_.size());
    const std::vector<int64_t> label = kmeans_clusters(matrix_.data(), num, k_, random, &num_clusters);
    std::vector<int64_t> pick(num_clusters, -1);
    for (int64_t i = 0; i < num; ++i) {
      int64_t& best = pick[label[i]];
      if (best < 0 || rises(eligible_[i], eligible_[best])) best = i;
    }
    std::vector<uint8_t> is_chosen(num, 0);
    for (const int64_t i : pick) is_chosen[i] = 1;
    std::vector<int64_t> chosen, rest;
    for (int64_t i = 0; i < num; ++i) (is_chosen[i] ? chosen : rest).push_back(eligible_[i]);
    rest = lowest(rest, k_ - int64_t(chosen.size()));
    chosen.insert(chosen.end(), rest.begin(), rest.end());
    return chosen;
  }

  void make_problem() {
    fill_matrix(valid_, Metric::kEuclidean);
    place_.assign(count_, -1);
    for (size_t p = 0; p < valid_.size(); ++p) place_[valid_[p]] = int64_t(p);
    has_distances_ = true;
    problem_.num_clients = int64_t(clients_.size());
    problem_.num_facilities = int64_t(eligible_.size());
    fill_costs();
    problem_.round_costs(k_);
  }

  void fill_costs() {
    const int64_t width = int64_t(valid_.size());
    problem_.cost.resize(clients_.size() * eligible_.size());
    double* cost = problem_.cost.data();
    for (const int64_t j : eligible_) {
      const double* row = matrix_.data() + place_[j] * width;
      for (size_t c = 0; c < clients_.size(); ++c) *cost++ = weight_[c] * row[place_[clients_[c]]];
    }
  }

  bool sharpen(const std::vector<int64_t>& chosen, double cost) {
    return problem_.sharpen(k_, chosen, cost, [this] { fill_costs(); });
  }

  std::vector<int64_t> opt_select(bool is_exact) {
    make_problem();
    std::vector<int64_t> facility(count_, -1), chosen = greedy_facilities(problem_, k_, {}), other;
    for (size_t f = 0; f < eligible_.size(); ++f) facility[eligible_[f]] = int64_t(f);
    for (const int64_t i : lowest(eligible_, k_)) other.push_back(facility[i]);
    double cost = swap_facilities(problem_, 0, chosen);
    if (swap_facilities(problem_, 0, other) < cost) {
      chosen = other;
      cost = problem_.total(other);
    }
    while (sharpen(chosen, cost)) cost = swap_facilities(problem_, 0, chosen);
    const double steps = double(clients_.size()) * double(k_ + 1);  // what rounding could hide in the k swaps of the proof
    bound_ = sure_bound(cost, steps, problem_.is_coarse_at(cost)) / problem_.scale / kSwapRatio;
    if (is_exact && cost > 0.0) prove(chosen);
    for (int64_t& f : chosen) f = eligible_[f];
    return chosen;
  }

  void prove(std::vector<int64_t>& chosen) {
    const bool has_limit = deadline_.has_limit();
    const Clock::time_point end = has_limit ? deadline_.next_group() : Clock::time_point();
    const auto is_late = [&] { return deadline_.is_stopped() || (has_limit && Clock::now() >= end); };
    double cost;
    do {
      const ExactResult result = best_facilities(problem_, k_, 0, chosen, is_late);
      cost = problem_.total(chosen);
      const bool coarse = problem_.is_coarse_at(cost);
      is_optimal_ = result.proven && !coarse;
      bound_ = std::max(bound_, sure_bound(result.lower_bound, double(clients_.size()), coarse) / problem_.scale);
    } while (!deadline_.is_stopped() && sharpen(chosen, cost));
  }

  Deadline& deadline_;
  std::vector<double> matrix_;
  double bound_ = 0.0;
  bool is_optimal_ = false;
  bool has_lost_ = false;        // a client that is not at a chosen point has a weight below the smallest double
  bool has_distances_ = false;   // matrix_ holds the Euclidean distances between valid candidates
  std::vector<int64_t> place_;  // of a candidate among the valid ones
  Rows<T> rows_;
  Coverage problem_;
};

template <typename T>
void all_groups(const SelectInput& input, const SelectOptions& options, const SelectOutput& output,
                const std::function<bool()>& is_unwanted) {
#ifdef _OPENMP
  // One group starts no team: waiting for a second thread can take longer than the group.
  const int num_threads = int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), input.num_groups)));
#else
  const int num_threads = 1;
#endif
  Deadline deadline(options.time_limit_s, input.num_groups, num_threads, is_unwanted);
  FirstError error;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Selector<T> selector(input, options, deadline);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t g = 0; g < input.num_groups; ++g) {
      if (!deadline.is_stopped()) error.keep([&] { selector.run(g, output); });
      deadline.group_done();
    }
    deadline.wait_for_others();
  }
  error.rethrow();
}

}  // namespace

void select_cpu(const SelectInput& input, const SelectOptions& options, const SelectOutput& output,
                const std::function<bool()>& is_unwanted) {
  if (input.points.dtype == Dtype::kFloat64) return all_groups<double>(input, options, output, is_unwanted);
  all_groups<float>(input, options, output, is_unwanted);
}

}  // namespace ampo
