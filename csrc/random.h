// Counter-based random numbers: a pure function of (seed, key, stream, index), so that order, batching and threads change
// nothing. The mixing is splitmix64's finaliser (Steele, Lea & Flood 2014).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace ampo {

AMPO_HOST_DEVICE inline uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

enum Stream : uint64_t { kRandomStrategy = 1, kKmeansStart = 2 };

struct Random {
  uint64_t state;

  AMPO_HOST_DEVICE Random(uint64_t seed, uint64_t key, Stream stream) : state(mix64(mix64(mix64(seed) ^ key) ^ stream)) {}
  AMPO_HOST_DEVICE uint64_t bits(uint64_t index) const { return mix64(state ^ mix64(index)); }
  double uniform(uint64_t index) const { return double(bits(index) >> 11) * 0x1.0p-53; }  // [0, 1)
};

}  // namespace ampo
