// The compiled selector without Python, for the sanitizers: every entry point over sizes where loops have edges (0, 1, odd
// dimensions, more groups than threads), against plain loops. Prints one line and returns 0, or says what failed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <set>
#include <vector>

#include "few_rows.h"
#include "first_error.h"
#include "kcenter.h"
#include "kmeans.h"
#include "kmedoids.h"
#include "pairwise.h"
#include "random.h"
#include "select.h"
#include "simd.h"
#include "stable_exp.h"

namespace {

int num_checks = 0;

#define EXPECT(condition)                                                             \
  do {                                                                                \
    ++num_checks;                                                                     \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);    \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (0)

// On a grid of quarters: every distance is exact in float32, bfloat16 holds the coordinates, and ties are common.
struct Pool {
  std::vector<float> single;
  std::vector<double> twice;
  std::vector<uint16_t> half;
  int64_t count, dim;

  Pool(int64_t count, int64_t dim, uint64_t seed) : count(count), dim(dim) {
    const ampo::Random random(seed, 0, ampo::kRandomStrategy);
    for (int64_t e = 0; e < count * dim; ++e) {
      const float value = float(int64_t(random.bits(uint64_t(e)) % 9) - 4) / 4.0f;
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      single.push_back(value);
      twice.push_back(value);
      half.push_back(uint16_t(bits >> 16));
    }
  }

  std::vector<ampo::Points> views() const {
    return {{single.data(), ampo::Dtype::kFloat32, count, dim},
            {half.data(), ampo::Dtype::kBfloat16, count, dim},
            {twice.data(), ampo::Dtype::kFloat64, count, dim}};
  }

  double squared(int64_t i, int64_t j) const {
    double sum = 0.0;
    for (int64_t d = 0; d < dim; ++d) sum += (twice[i * dim + d] - twice[j * dim + d]) * (twice[i * dim + d] - twice[j * dim + d]);
    return sum;
  }
};

void test_pairwise() {
  for (const int64_t dim : {1, 3, 8, 17, 64, 67}) {
    const Pool pool(45, dim, uint64_t(dim));
    const std::vector<int64_t> offsets{0, 0, 1, 3, 20, 45};
    for (const ampo::Points& points : pool.views()) {
      for (const ampo::Metric metric : {ampo::Metric::kSquared, ampo::Metric::kEuclidean, ampo::Metric::kCosine}) {
        const int64_t total = 1 + 4 + 17 * 17 + 25 * 25;
        std::vector<float> single(total, -1.0f);
        std::vector<double> twice(total, -1.0);
        const bool is_double = points.dtype == ampo::Dtype::kFloat64;
        void* out = is_double ? static_cast<void*>(twice.data()) : static_cast<void*>(single.data());
        ampo::pairwise_cpu(points, metric, offsets.data(), 5, out);
        int64_t at = 0;
        for (int g = 0; g < 5; ++g) {
          for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i) {
            for (int64_t j = offsets[g]; j < offsets[g + 1]; ++j, ++at) {
              const double found = is_double ? twice[at] : double(single[at]);
              EXPECT(found >= 0.0 && (i != j || found == 0.0));
              if (metric == ampo::Metric::kSquared) EXPECT(found == pool.squared(i, j));
              if (metric == ampo::Metric::kEuclidean) EXPECT(std::abs(found - std::sqrt(pool.squared(i, j))) < 1e-5);
            }
          }
        }
      }
    }
  }
}

void test_k_center() {
  for (const int64_t count : {1, 2, 63, 300}) {
    const Pool pool(count, 5, uint64_t(count));
    for (const int64_t k : {int64_t(1), (count + 1) / 2, count}) {
      for (const std::vector<int64_t>& seeds : {std::vector<int64_t>{}, std::vector<int64_t>{count - 1}}) {
        std::vector<int64_t> expected = seeds.empty() ? std::vector<int64_t>{0} : seeds;
        while (int64_t(expected.size()) < k) {
          int64_t best = -1;
          double farthest = -1.0;
          for (int64_t i = 0; i < count; ++i) {
            if (std::count(expected.begin(), expected.end(), i)) continue;
            double nearest = std::numeric_limits<double>::infinity();
            for (const int64_t c : expected) nearest = std::min(nearest, pool.squared(i, c));
            if (nearest > farthest) best = i, farthest = nearest;
          }
          expected.push_back(best);
        }
        for (const ampo::Points& points : pool.views()) {
          std::vector<int64_t> chosen(k, -1);
          ampo::kcenter_cpu(points, k, seeds, chosen.data());
          EXPECT(chosen == expected);
        }
      }
    }
  }
}

// The cheapest of all subsets of size k that hold the first num_fixed facilities.
double cheapest(const ampo::Coverage& problem, int64_t k, int64_t num_fixed) {
  double best = std::numeric_limits<double>::infinity();
  for (uint32_t bits = 0; bits < (1u << problem.num_facilities); ++bits) {
    std::vector<int64_t> chosen;
    for (int64_t j = 0; j < problem.num_facilities; ++j) {
      if (bits >> j & 1) chosen.push_back(j);
    }
    bool has_fixed = int64_t(chosen.size()) == k;
    for (int64_t j = 0; j < num_fixed && has_fixed; ++j) has_fixed = bits >> j & 1;
    if (has_fixed) best = std::min(best, problem.total(chosen));
  }
  return best;
}

void test_k_medoids() {
  for (int64_t n = 1; n <= 10; ++n) {
    const Pool pool(n, 2, uint64_t(100 + n));
    ampo::Coverage problem;
    problem.num_clients = problem.num_facilities = n;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = 0; i < n; ++i) problem.cost.push_back(double(1 + i % 3) * std::sqrt(pool.squared(i, j)));
    }
    problem.round_costs(n);
    for (int64_t k = 1; k <= n; ++k) {
      for (int64_t num_fixed = 0; num_fixed <= std::min<int64_t>(k, 2); ++num_fixed) {
        std::vector<int64_t> fixed;
        for (int64_t j = 0; j < num_fixed; ++j) fixed.push_back(j);
        std::vector<int64_t> chosen = ampo::greedy_facilities(problem, k, fixed);
        const double local = ampo::swap_facilities(problem, num_fixed, chosen);
        const double optimum = cheapest(problem, k, num_fixed);
        EXPECT(int64_t(std::set<int64_t>(chosen.begin(), chosen.end()).size()) == k);
        EXPECT(optimum <= local && local <= 5.0 * optimum);
        const ampo::ExactResult exact = ampo::best_facilities(problem, k, num_fixed, chosen, [] { return false; });
        const double slack = std::floor(std::ldexp(optimum, -26));
        EXPECT(exact.proven && optimum - slack <= exact.lower_bound && exact.lower_bound <= optimum);
        EXPECT(problem.total(chosen) <= optimum + slack);
        const ampo::ExactResult late = ampo::best_facilities(problem, k, num_fixed, chosen, [] { return true; });
        EXPECT(late.lower_bound <= optimum);
      }
    }
  }
}

void test_k_means() {
  for (const int64_t count : {1, 2, 9, 40}) {
    const Pool pool(count, 2, uint64_t(count));
    std::vector<double> squared;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < count; ++j) squared.push_back(pool.squared(i, j));
    }
    for (int64_t k = 1; k <= count; ++k) {
      int64_t clusters = 0;
      const std::vector<int64_t> label =
          ampo::kmeans_clusters(squared.data(), count, k, ampo::Random(3, 5, ampo::kKmeansStart), &clusters);
      const std::set<int64_t> used(label.begin(), label.end());
      EXPECT(clusters >= 1 && clusters <= k && int64_t(used.size()) == clusters && *used.rbegin() == clusters - 1);
    }
  }
}

void test_select() {
  const std::vector<int64_t> sizes{0, 1, 2, 9, 33, 0, 12};
  std::vector<int64_t> offsets{0}, keys;
  for (const int64_t size : sizes) {
    offsets.push_back(offsets.back() + size);
    keys.push_back(-size);
  }
  const int64_t n = offsets.back(), num_groups = int64_t(sizes.size());
  const Pool pool(n, 6, 1);
  const ampo::Random random(9, 9, ampo::kRandomStrategy);
  std::vector<double> reward;
  std::vector<uint8_t> valid, positive_ok;
  for (int64_t i = 0; i < n; ++i) {
    valid.push_back(random.bits(uint64_t(3 * i)) % 8 != 0);
    positive_ok.push_back(random.bits(uint64_t(3 * i + 1)) % 4 != 0);
    reward.push_back(valid.back() ? double(random.bits(uint64_t(3 * i + 2)) % 5) / 4 : std::nan(""));
  }
  for (int strategy = 0; strategy <= int(ampo::Strategy::kRandom); ++strategy) {
    for (const int64_t k : {1, 4, 50}) {
      for (const int64_t num_positives : {1, 3}) {
        for (const double tie_tol : {std::nan(""), 0.0, 10.0}) {
          for (const ampo::Points& points : pool.views()) {
            std::vector<int64_t> positive(num_groups * num_positives, -7), negative(num_groups * k, -7);
            std::vector<double> cost(num_groups), bound(num_groups);
            std::vector<uint8_t> proven(num_groups);
            const ampo::SelectInput input{points,          reward.data(), valid.data(), positive_ok.data(),
                                          offsets.data(), keys.data(),   num_groups};
            const ampo::SelectOptions options{ampo::Strategy(strategy), k, num_positives, strategy % 2 == 0, tie_tol, 7, 0.5};
            ampo::select_cpu(input, options, {positive.data(), negative.data(), cost.data(), bound.data(), proven.data()});
            for (int64_t g = 0; g < num_groups; ++g) {
              std::set<int64_t> seen;
              for (int64_t p = 0; p < num_positives; ++p) {
                const int64_t i = positive[g * num_positives + p];
                EXPECT(-1 <= i && i < sizes[g]);
                if (i >= 0) EXPECT(seen.insert(i).second && valid[offsets[g] + i] && positive_ok[offsets[g] + i]);
              }
              for (int64_t s = 0; s < k; ++s) {
                const int64_t i = negative[g * k + s];
                EXPECT(-1 <= i && i < sizes[g]);
                if (i >= 0) EXPECT(seen.insert(i).second && valid[offsets[g] + i]);
              }
              EXPECT(std::isnan(cost[g]) == (negative[g * k] < 0));
              EXPECT(std::isnan(cost[g]) || bound[g] <= cost[g]);
            }
          }
        }
      }
    }
  }
}

// A limit that is long past proves nothing, and overflows nothing on its way into the clock's integers.
void test_time_limits() {
  constexpr int64_t count = 24, k = 6;
  const Pool pool(2 * count, 3, 5);
  const std::vector<double> reward(2 * count, 0.0);
  const std::vector<uint8_t> yes(2 * count, 1);
  const std::vector<int64_t> offsets{0, count, 2 * count}, keys{0, 1};
  for (const double limit_s : {0.0, -1.0, -1e300, -std::numeric_limits<double>::infinity()}) {
    std::vector<int64_t> positive(2), negative(2 * k);
    std::vector<double> cost(2), bound(2);
    std::vector<uint8_t> proven(2, 7);
    const ampo::SelectInput input{pool.views()[0], reward.data(), yes.data(), yes.data(), offsets.data(), keys.data(), 2};
    const ampo::SelectOptions options{ampo::Strategy::kOptSelectExact, k, 1, false, std::nan(""), 7, limit_s};
    ampo::select_cpu(input, options, {positive.data(), negative.data(), cost.data(), bound.data(), proven.data()});
    EXPECT(proven[0] == 0 && proven[1] == 0);
  }
}

void test_an_error_in_a_region_arrives_behind_it() {
  ampo::FirstError none, error;
  none.keep([] {});
  none.rethrow();
  bool is_caught = false;
#pragma omp parallel for num_threads(4)
  for (int i = 0; i < 100; ++i) {
    error.keep([] { throw std::bad_alloc(); });
  }
  error.keep([] { EXPECT(!"called after an error"); });
  try {
    error.rethrow();
  } catch (const std::bad_alloc&) {
    is_caught = true;
  }
  EXPECT(is_caught);
}

}  // namespace

void test_stable_exp() {
  for (int64_t step = -55000; step < 52000; ++step) {
    const double x = 0.0137 * double(step), ours = ampo::stable_exp(x), libm = std::exp(x);
    const double last_place = std::isinf(libm) ? 0.0 : std::nextafter(libm, INFINITY) - libm;
    EXPECT(ours == libm || std::abs(ours - libm) <= 2 * last_place);
  }
  EXPECT(ampo::stable_exp(0.0) == 1.0 && ampo::stable_exp(INFINITY) == INFINITY && ampo::stable_exp(-INFINITY) == 0.0);
  EXPECT(std::isnan(ampo::stable_exp(std::nan(""))));
}

void test_few_rows() {
  for (const int64_t num_rows : {0, 1, 5, 8, 9, 17, 24, 25, 32, 33, 49, 65}) {
    for (const int64_t num_outputs : {0, 1, 11, 24, 61}) {
      for (const int64_t dim : {0, 1, 7, 16, 35}) {
        // Quarters and halves of small integers: every sum is exact, in any order.
        std::vector<float> x(num_rows * dim), weight(num_outputs * dim), bias(num_outputs), out(num_rows * num_outputs, NAN);
        for (size_t i = 0; i < x.size(); ++i) x[i] = 0.25f * float(int(i * 7 % 23) - 11);
        for (size_t i = 0; i < weight.size(); ++i) weight[i] = 0.5f * float(int(i * 5 % 19) - 9);
        for (size_t i = 0; i < bias.size(); ++i) bias[i] = float(i);
        for (const float* added : {static_cast<const float*>(nullptr), static_cast<const float*>(bias.data())}) {
          ampo::few_rows_cpu(x.data(), num_rows, weight.data(), added, num_outputs, dim, out.data());
          bool is_right = true;
          for (int64_t r = 0; r < num_rows; ++r) {
            for (int64_t n = 0; n < num_outputs; ++n) {
              float sum = added ? added[n] : 0.0f;
              for (int64_t d = 0; d < dim; ++d) sum += x[r * dim + d] * weight[n * dim + d];
              is_right = is_right && out[r * num_outputs + n] == sum;
            }
          }
          EXPECT(is_right);
        }
      }
    }
  }
}

int main() {
  test_stable_exp();
  test_few_rows();
  test_pairwise();
  test_k_center();
  test_k_medoids();
  test_k_means();
  test_select();
  test_time_limits();
  test_an_error_in_a_region_arrives_behind_it();
  std::printf("selector: %d checks passed, vector unit %s\n", num_checks, ampo::vector_path());
  return 0;
}
