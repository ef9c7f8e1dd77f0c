// Just enough of CUDA's language to run the kernels' text on a CPU, one thread for each thread of a block, so that their logic
// is tested where there is no GPU. It says nothing about a device's memory model, speed or rounding of library functions.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

namespace cuda_on_cpu {

inline pthread_barrier_t barrier, warp_barrier[32];
alignas(16) inline unsigned char shared[128 * 1024];
inline double exchange[1024];
inline uint32_t words[1024][6];

// Shared memory as a block may find it: with nothing in it that could pass for an index.
inline void scribble() { std::memset(shared, 0x7f, sizeof(shared)); }

inline void sync_warp() { pthread_barrier_wait(&warp_barrier[threadIdx.x / 32]); }

// Runs kernel() for every block, one after the other, with num_threads threads at a time, whole warps of them.
inline void launch(unsigned num_blocks, unsigned num_threads, const std::function<void()>& kernel) {
  for (unsigned block = 0; block < num_blocks; ++block) {
    const unsigned num_warps = num_threads / 32;
    pthread_barrier_init(&barrier, nullptr, num_threads);
    for (unsigned w = 0; w < num_warps; ++w) pthread_barrier_init(&warp_barrier[w], nullptr, 32);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < num_threads; ++t) {
      threads.emplace_back([=, &kernel] {
        threadIdx.x = t;
        blockIdx.x = block;
        kernel();
      });
    }
    for (std::thread& thread : threads) thread.join();
    pthread_barrier_destroy(&barrier);
    for (unsigned w = 0; w < num_warps; ++w) pthread_barrier_destroy(&warp_barrier[w]);
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { pthread_barrier_wait(&cuda_on_cpu::barrier); }

#define AMPO_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(cuda_on_cpu::shared)

namespace ampo {

// In the shuffles' order.
template <typename T, typename Join>
T over_warp(T value, Join join) {
  const unsigned thread = threadIdx.x;
  for (unsigned width = 16; width > 0; width /= 2) {
    cuda_on_cpu::exchange[thread] = double(value);
    cuda_on_cpu::sync_warp();
    value = join(value, T(cuda_on_cpu::exchange[thread ^ width]));
    cuda_on_cpu::sync_warp();
  }
  return value;
}

template <typename T>
T warp_sum(T value) {
  return over_warp(value, [](T a, T b) { return a + b; });
}

inline double warp_max(double value) {
  return over_warp(value, [](double a, double b) { return fmax(a, b); });
}

// sum += a b as PTX documents the places of mma.m16n8k16's numbers.
inline void warp_mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned first = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  for (int w = 0; w < 4; ++w) cuda_on_cpu::words[threadIdx.x][w] = a[w];
  for (int w = 0; w < 2; ++w) cuda_on_cpu::words[threadIdx.x][4 + w] = b[w];
  cuda_on_cpu::sync_warp();
  const auto number = [first](unsigned owner, unsigned word, unsigned half) {
    const uint32_t bits = cuda_on_cpu::words[first + owner][word] >> (16 * half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  };
  for (unsigned c = 0; c < 4; ++c) {
    const unsigned row = lane / 4 + 8 * (c / 2), col = 2 * (lane % 4) + c % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const float left = number(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2);
      sum[c] += left * number(col * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
  }
  cuda_on_cpu::sync_warp();
}

}  // namespace ampo

inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
