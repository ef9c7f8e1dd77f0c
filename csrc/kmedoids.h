// Weighted k-medoids by single swaps, for many small groups at once.
#pragma once

#include <cstdint>

namespace ampo {

// Lowers cost = sum_i weight_i * min_{j in chosen} distance_ij by single swaps (one chosen out, one eligible in) until
// none lowers it by more than 1e-12 of itself: at most 5 x the optimum (Arya et al. 2004). The best swap is taken each
// time; equal ones go to the lowest resulting index set.
//
// distances [sum N * N] float32: one [N, N] block a group, the blocks one after the other
// weights   [n] float64; 0 for a point that is no client
// eligible  [n] uint8: may be chosen
// offsets   [num_groups + 1] int64
// chosen    [num_groups, k] int64 in and out: start, then result; local indices ascending, -1 after the last one
// cost      [num_groups] float64 out; NaN where nothing is chosen
void kmedoids_swap_cpu(const float* distances, const double* weights, const uint8_t* eligible, const int64_t* offsets,
                       int64_t num_groups, int64_t k, int64_t* chosen, double* cost);

}  // namespace ampo
