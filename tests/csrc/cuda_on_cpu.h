// Just enough of CUDA's language to run the kernels' text on a CPU, one thread for each thread of a block, so that their logic
// is tested where there is no GPU. It says nothing about a device's memory model, speed or rounding of library functions.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

namespace cuda_on_cpu {

inline pthread_barrier_t barrier;
alignas(16) inline unsigned char shared[128 * 1024];
inline double exchange[1024];

// Runs kernel() for every block, one after the other, with num_threads threads at a time.
inline void launch(unsigned num_blocks, unsigned num_threads, const std::function<void()>& kernel) {
  for (unsigned block = 0; block < num_blocks; ++block) {
    pthread_barrier_init(&barrier, nullptr, num_threads);
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
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { pthread_barrier_wait(&cuda_on_cpu::barrier); }

#define AMPO_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(cuda_on_cpu::shared)

namespace ampo {

// The shuffles' order of additions. Every thread of the block takes part: the kernels call it uniformly.
template <typename T>
T warp_sum(T value) {
  const unsigned lane = threadIdx.x;
  for (unsigned width = 16; width > 0; width /= 2) {
    cuda_on_cpu::exchange[lane] = double(value);
    __syncthreads();
    value += T(cuda_on_cpu::exchange[lane ^ width]);
    __syncthreads();
  }
  return value;
}

}  // namespace ampo
