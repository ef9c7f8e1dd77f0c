// Which vector unit the inner loops of a CPU use, chosen once at run time: AVX-512, AVX2 + FMA, or plain C++.
//
// Their text is written in compiler vectors, not intrinsics: one for every instruction set, compiled once for each by the
// target attribute of the function that it is inlined into.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define AMPO_X86 1
#endif
#define AMPO_INLINE inline __attribute__((always_inline))

namespace ampo {

enum class Simd { kPlain, kAvx2, kAvx512 };

Simd simd();

// "avx512", "avx2" or "plain"
const char* vector_path();

template <typename T, int kBytes>
struct Vector {
  typedef T Type __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / int(sizeof(T));
};

}  // namespace ampo
