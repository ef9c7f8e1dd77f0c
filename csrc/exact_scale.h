// The scale that makes sums of rounded costs exact, and when its steps are too coarse, for host and device alike.
#pragma once

#include <cmath>

#include "host_device.h"

namespace ampo {

// A power of two by which `count` values up to `largest` can be multiplied and added up below 2^52.
AMPO_HOST_DEVICE inline double exact_scale(double largest, double count) {
  if (!(largest > 0.0)) return 1.0;
  int largest_exponent, count_exponent;
  frexp(largest, &largest_exponent);
  frexp(count, &count_exponent);
  const int exponent = 51 - largest_exponent - count_exponent;
  return ldexp(1.0, exponent < 1000 ? exponent : 1000);
}

// Rounding moves the total of `num_clients` costs by half a step each. Whether that is more than 2^-24, the resolution of the
// float32 distances, of `total`, and could decide between two choices of which one costs `total`.
AMPO_HOST_DEVICE inline bool is_coarse(double total, double num_clients) { return total < 16777216.0 * num_clients; }

// What no better choice than one of the rounded `total` has to pay for a single client, before scaling.
AMPO_HOST_DEVICE inline double cost_limit(double total, double num_clients, double scale) {
  return (total + num_clients) / scale;
}

// A rounded total, or a bound on one, that holds for the costs before rounding: lowered by `steps` where they are coarse.
AMPO_HOST_DEVICE inline double sure_bound(double bound, double steps, bool coarse) {
  return coarse ? fmax(0.0, bound - steps) : bound;
}

}  // namespace ampo
