// The scale that makes sums of rounded costs exact, for host and device alike.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define AMPO_HOST_DEVICE __host__ __device__
#else
#define AMPO_HOST_DEVICE
#endif

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

}  // namespace ampo
