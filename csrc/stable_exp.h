// exp with the same bits on every host and device. Those of libm and of CUDA differ in the last place, and weights that differ
// there can choose differently.
#pragma once

#include <cmath>

#include "host_device.h"

namespace ampo {

// Within 1.5 units of the last place; only operations that IEEE 754 rounds one way, so compile without contraction to fma.
AMPO_HOST_DEVICE inline double stable_exp(double x) {
  if (!(x < 709.79)) return x != x ? x : INFINITY;
  if (x < -745.2) return 0.0;
  // x = n ln 2 + r, |r| <= ln 2 / 2; the first part of ln 2 has so few digits that n times it is exact (Cody & Waite 1980).
  const double n = rint(x * 1.4426950408889634);
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double sum = 1.0 / 6227020800.0;  // Taylor up to r^13 / 13!: what is left out is below 2^-57
  sum = sum * r + 1.0 / 479001600.0;
  sum = sum * r + 1.0 / 39916800.0;
  sum = sum * r + 1.0 / 3628800.0;
  sum = sum * r + 1.0 / 362880.0;
  sum = sum * r + 1.0 / 40320.0;
  sum = sum * r + 1.0 / 5040.0;
  sum = sum * r + 1.0 / 720.0;
  sum = sum * r + 1.0 / 120.0;
  sum = sum * r + 1.0 / 24.0;
  sum = sum * r + 1.0 / 6.0;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  return ldexp(sum, int(n));
}

}  // namespace ampo
