// What the kernels share: numbers from float32 or bfloat16 memory, a block's shared memory, a warp's sum and maximum.
//
// The kernels use threads, blocks, shared memory, __syncthreads, warp_sum and warp_max, nothing else, so that a test can run the same
// text on a CPU with one thread for each of a block's (tests/csrc/cuda_on_cpu.h).
#pragma once

#include <cstdint>

namespace ampo {

#ifdef __CUDACC__
// A block's dynamic shared memory as one struct.
#define AMPO_SHARED(Type, name)                                    \
  extern __shared__ __align__(16) unsigned char ampo_shared[];    \
  Type& name = *reinterpret_cast<Type*>(ampo_shared)

// The sum over the 32 threads of a warp, the same bits in each of them.
__device__ inline float warp_sum(float value) {
  for (int width = 16; width > 0; width /= 2) value += __shfl_xor_sync(0xffffffffu, value, width);
  return value;
}

__device__ inline double warp_sum(double value) {
  for (int width = 16; width > 0; width /= 2) value += __shfl_xor_sync(0xffffffffu, value, width);
  return value;
}

__device__ inline double warp_max(double value) {
  for (int width = 16; width > 0; width /= 2) value = fmax(value, __shfl_xor_sync(0xffffffffu, value, width));
  return value;
}
#endif

constexpr int kThreads = 256;
constexpr int kWarp = 32;

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(uint16_t bfloat16) {
  union {
    uint32_t bits;
    float value;
  } wide = {uint32_t(bfloat16) << 16};
  return wide.value;
}

// kWidth neighbours in one load; the address must be a multiple of their size.
template <typename Raw, int kWidth>
struct alignas(sizeof(Raw) * kWidth) Chunk {
  Raw value[kWidth];
};

}  // namespace ampo
