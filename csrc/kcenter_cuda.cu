#include <algorithm>

#include "cuda_call.h"
#include "kcenter.h"
#include "kcenter_kernels.cuh"

namespace ampo {
namespace {

// As many blocks as the device holds at once, so that a step is one wave; what a block needs depends on dim.
template <typename Raw, int kWidth>
int num_blocks(int64_t num_points, size_t shared_bytes) {
  int device = 0, processors = 0, per_processor = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, pool_step<Raw, kWidth>, kThreads, shared_bytes),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  constexpr int64_t kWarps = kThreads / kWarp;
  return int(std::min<int64_t>(int64_t(per_processor) * processors, (num_points + kWarps - 1) / kWarps));
}

// Gives args what they lack: nearest, partial, num_blocks.
template <typename Raw, int kWidth>
void run(PoolArgs args, int64_t k, cudaStream_t stream) {
  const size_t shared_bytes = sizeof(PoolShared) + sizeof(float) * size_t(args.dim);
  args.num_blocks = num_blocks<Raw, kWidth>(args.count, shared_bytes);
  const DeviceBuffer<float> nearest(args.count, stream);
  const DeviceBuffer<Farthest> partial(2 * args.num_blocks, stream);
  args.nearest = nearest.data(), args.partial = partial.data();
  for (int64_t step = 0; step < k; ++step) {
    const bool is_last = step == k - 1;
    pool_step<Raw, kWidth><<<is_last ? 1 : args.num_blocks, kThreads, shared_bytes, stream>>>(args, step, is_last);
  }
  cuda_check(cudaGetLastError(), "k-center step");
}

bool is_aligned(const Points& points, size_t element) {
  return reinterpret_cast<uintptr_t>(points.data) % 16 == 0 && points.dim * element % 16 == 0;
}

}  // namespace

void kcenter_cuda(const Points& points, int64_t k, const std::vector<int64_t>& seeds, int64_t* chosen, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const std::vector<int64_t> first = seeds.empty() ? std::vector<int64_t>{0} : seeds;
  cuda_check(cudaMemcpyAsync(chosen, first.data(), sizeof(int64_t) * first.size(), cudaMemcpyHostToDevice, stream), "seeds");
  const PoolArgs args{points.data, points.count, points.dim, nullptr, chosen, nullptr, int64_t(first.size()), 0};
  if (points.dtype == Dtype::kBfloat16) {
    is_aligned(points, 2) ? run<uint16_t, 8>(args, k, stream) : run<uint16_t, 1>(args, k, stream);
  } else {
    is_aligned(points, 4) ? run<float, 4>(args, k, stream) : run<float, 1>(args, k, stream);
  }
}

}  // namespace ampo
