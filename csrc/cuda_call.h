// CUDA errors as exceptions, and device memory that lives in stream order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace ampo {

inline void cuda_check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// The kernels for bfloat16 use its tensor cores' instructions.
inline void require_bfloat16_cores() {
  int device = 0, major = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  if (major < 8) throw std::runtime_error("bfloat16 points need a GPU of compute capability 8.0 or more; pass float32");
}

// What the pool of a device keeps for the next call.
constexpr uint64_t kKeptBytes = uint64_t(64) << 20;

// Untold, the pool gives all free memory back to the driver whenever the device is waited for, and every call asks for it again.
// A pool that keeps more already is left so.
inline void keep_freed_memory() {
  static std::mutex mutex;
  static std::set<int> done;
  int device = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count(device)) return;
  cudaMemPool_t pool;
  uint64_t kept = 0;
  cuda_check(cudaDeviceGetDefaultMemPool(&pool, device), "cudaDeviceGetDefaultMemPool");
  cuda_check(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "cudaMemPoolGetAttribute");
  if (kept < kKeptBytes) {
    kept = kKeptBytes;
    cuda_check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "cudaMemPoolSetAttribute");
  }
  done.insert(device);
}

// Allocated, and given back, in the order of the stream: neither waits for the device.
template <typename T>
class DeviceBuffer {
 public:
  DeviceBuffer(int64_t count, cudaStream_t stream) : stream_(stream) {
    keep_freed_memory();
    cuda_check(cudaMallocAsync(reinterpret_cast<void**>(&data_), sizeof(T) * (count > 0 ? count : 1), stream), "cudaMallocAsync");
  }
  DeviceBuffer(const T* host, int64_t count, cudaStream_t stream) : DeviceBuffer(count, stream) {
    if (count == 0) return;
    // From pageable memory: the call returns once the host's copy is no longer needed.
    cuda_check(cudaMemcpyAsync(data_, host, sizeof(T) * count, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  }
  ~DeviceBuffer() { cudaFreeAsync(data_, stream_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  cudaStream_t stream_;
};

}  // namespace ampo
