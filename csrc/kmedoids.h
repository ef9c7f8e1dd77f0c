// Weighted k-medoids (k-median over a finite set) of one Coverage problem: a greedy start, single swaps to a local optimum,
// and the proven optimum. Facilities are indices into the problem; `fixed` ones are always chosen.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "coverage.h"

namespace ampo {

// Adds the facility that lowers the cost most until k are chosen (BUILD of Kaufman & Rousseeuw 1990), ties to the lowest
// index. Gains only fall as facilities are added, so only the most promising ones are computed again.
std::vector<int64_t> greedy_facilities(const Coverage& problem, int64_t k, const std::vector<int64_t>& fixed);

// Swaps one chosen facility for another as long as that lowers the cost: at most 5 x the optimum (Arya et al. 2004).
// Candidates come in index order and a swap is made at once (eager FasterPAM, Schubert & Rousseeuw 2021: one pass over the
// clients gives the loss of all k removals); among removals the lowest cost, then the lowest facility, goes.
// The first num_fixed entries of `chosen` stay. Returns the cost.
double swap_facilities(const Coverage& problem, int64_t num_fixed, std::vector<int64_t>& chosen);

struct ExactResult {
  double lower_bound;  // no k facilities cost less
  bool proven;         // the cost of `chosen` is at most 2^-26 of it above that
};

// Branch and bound with the Lagrangian bound of the relaxed assignment (Cornuejols, Fisher & Nemhauser 1977), from the
// given choice of k, which it improves in place. Stops, with the bound reached, once is_late() says so.
ExactResult best_facilities(const Coverage& problem, int64_t k, int64_t num_fixed, std::vector<int64_t>& chosen,
                            const std::function<bool()>& is_late);

}  // namespace ampo
