#include "cuda_call.h"
#include "pairwise.h"
#include "pairwise_kernels.cuh"

namespace ampo {
namespace {

std::vector<Tile> tiles_of(const int64_t* offsets, int64_t num_groups) {
  std::vector<Tile> tiles;
  int64_t out = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t count = offsets[g + 1] - offsets[g], side = (count + kSide - 1) / kSide;
    for (int64_t row = 0; row < side; ++row) {
      for (int64_t col = 0; col < side; ++col) tiles.push_back({offsets[g], count, out, int32_t(row), int32_t(col)});
    }
    out += count * count;
  }
  return tiles;
}

template <typename Raw>
void run(PairwiseArgs args, int64_t num_points, int64_t num_tiles, double* length, cudaStream_t stream) {
  if (length != nullptr) {
    constexpr int64_t kRows = kThreads / kWarp;
    point_lengths<Raw><<<dim3(unsigned((num_points + kRows - 1) / kRows)), kThreads, 0, stream>>>(args.points, num_points,
                                                                                                  args.dim, length);
  }
  pairwise_tile<Raw><<<dim3(unsigned(num_tiles)), kThreads, sizeof(PairwiseShared<Raw>), stream>>>(args);
  cuda_check(cudaGetLastError(), "pairwise distances");
}

}  // namespace

void pairwise_cuda(const Points& points, Metric metric, const int64_t* offsets, int64_t num_groups, float* out, void* stream_pointer) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const std::vector<Tile> host_tiles = tiles_of(offsets, num_groups);
  if (host_tiles.empty()) return;
  const DeviceBuffer<Tile> tiles(host_tiles.data(), int64_t(host_tiles.size()), stream);
  const bool needs_lengths = metric == Metric::kCosine || points.dtype == Dtype::kBfloat16;
  const DeviceBuffer<double> buffer(needs_lengths ? points.count : 0, stream);
  double* length = needs_lengths ? buffer.data() : nullptr;
  const PairwiseArgs args{points.data, points.dim, tiles.data(), length, metric, out};
  const int64_t num_tiles = int64_t(host_tiles.size());
  if (points.dtype == Dtype::kBfloat16) {
    require_bfloat16_cores();
    run<uint16_t>(args, points.count, num_tiles, length, stream);
  } else {
    run<float>(args, points.count, num_tiles, length, stream);
  }
}

}  // namespace ampo
