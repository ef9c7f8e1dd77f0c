#include "simd.h"

#include <cstdlib>
#include <cstring>

namespace ampo {
namespace {

Simd detect() {
#ifdef AMPO_X86
  // AMPO_FAST_SIMD=plain|avx2 narrows the choice: to test the other paths, and to compare results between machines.
  const char* wanted = std::getenv("AMPO_FAST_SIMD");
  const bool is_plain = wanted && !std::strcmp(wanted, "plain"), is_avx2 = wanted && !std::strcmp(wanted, "avx2");
  if (is_plain) return Simd::kPlain;
  __builtin_cpu_init();
  if (!is_avx2 && __builtin_cpu_supports("avx512f")) return Simd::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Simd::kAvx2;
#endif
  return Simd::kPlain;
}

}  // namespace

Simd simd() {
  static const Simd chosen = detect();
  return chosen;
}

const char* vector_path() {
  return simd() == Simd::kAvx512 ? "avx512" : simd() == Simd::kAvx2 ? "avx2" : "plain";
}

}  // namespace ampo
