// Distances within ragged groups, one block a 64 x 64 tile of a group's matrix. Of float32 points differences are squared, as on
// the CPU: no inner products are subtracted, so near-duplicates keep their digits. Of bfloat16 points the tensor cores make
// inner products, and near pairs are squared differences again (gram_kernels.cuh). d(i, j) = d(j, i) bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_block.cuh"
#include "gram_kernels.cuh"
#include "pairwise.h"

namespace ampo {

constexpr int kSide = 64;
constexpr int kDepth = 32;
constexpr int kHeld = kSide / 16;  // rows and columns of a tile that one thread holds

struct Tile {
  int64_t begin, count, out;  // the group's first point, its size, and where its matrix begins
  int32_t row, col;           // of the tile, in tiles
};

struct PairwiseArgs {
  const void* points;  // [n, dim] row-major
  int64_t dim;
  const Tile* tile;      // [blocks]
  const double* length;  // [n] Euclidean lengths of the points, for cosine or bfloat16 only
  Metric metric;
  float* out;
};

template <typename Raw>
struct PairwiseShared {
  float row[kSide][kDepth + 1], col[kSide][kDepth + 1];
};

template <>
struct PairwiseShared<uint16_t> {
  float gram[kSide][kSide + 1];
  int num_near;
  int16_t pair[kSide * kSide];
};

// One warp a point.
template <typename Raw>
__global__ void point_lengths(const void* points, int64_t count, int64_t dim, double* length) {
  const int64_t i = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const Raw* point = static_cast<const Raw*>(points) + (i < count ? i : 0) * dim;
  double sum = 0.0;
  for (int64_t d = threadIdx.x % kWarp; d < dim; d += kWarp) sum += double(as_float(point[d])) * double(as_float(point[d]));
  sum = warp_sum(sum);
  if (i < count && threadIdx.x % kWarp == 0) length[i] = sqrt(sum);
}

// Makes coordinates of a point's numbers: cosine's points are of length 1, or 0.
struct Unit {
  bool is_scaled;
  double scale;

  __device__ Unit(const PairwiseArgs& args, int64_t point) : is_scaled(args.metric == Metric::kCosine), scale(0.0) {
    if (is_scaled && args.length[point] != 0.0) scale = 1.0 / args.length[point];
  }
  __device__ float operator()(float value) const { return is_scaled ? float(double(value) * scale) : value; }
};

template <typename Raw>
__device__ float coordinate(const PairwiseArgs& args, int64_t point, int64_t d) {
  return Unit(args, point)(as_float(static_cast<const Raw*>(args.points)[point * args.dim + d]));
}

template <typename Raw>
__device__ void load_tile(const PairwiseArgs& args, const Tile& tile, int64_t first, int64_t begin, float (*into)[kDepth + 1]) {
  for (int e = threadIdx.x; e < kSide * kDepth; e += kThreads) {
    const int64_t i = first + e / kDepth, d = begin + e % kDepth;
    into[e / kDepth][e % kDepth] = i < tile.count && d < args.dim ? coordinate<Raw>(args, tile.begin + i, d) : 0.0f;
  }
}

__device__ inline float from_squared(const PairwiseArgs& args, const Tile& tile, int64_t i, int64_t j, float squared) {
  if (i == j) return 0.0f;
  if (args.metric == Metric::kSquared) return squared;
  if (args.metric == Metric::kEuclidean) return sqrtf(squared);
  const bool is_zero_i = args.length[tile.begin + i] == 0.0, is_zero_j = args.length[tile.begin + j] == 0.0;
  return is_zero_i != is_zero_j ? 1.0f : squared / 2.0f;
}

template <typename Raw>
__global__ void pairwise_tile(PairwiseArgs args) {
  AMPO_SHARED(PairwiseShared<Raw>, s);
  const Tile tile = args.tile[blockIdx.x];
  const int64_t row_first = int64_t(tile.row) * kSide, col_first = int64_t(tile.col) * kSide;
  const int row0 = threadIdx.x / 16, col0 = threadIdx.x % 16;
  float sum[kHeld][kHeld] = {};
  for (int64_t begin = 0; begin < args.dim; begin += kDepth) {
    load_tile<Raw>(args, tile, row_first, begin, s.row);
    load_tile<Raw>(args, tile, col_first, begin, s.col);
    __syncthreads();
    for (int d = 0; d < kDepth; ++d) {
      float row[kHeld], col[kHeld];
      for (int t = 0; t < kHeld; ++t) row[t] = s.row[row0 + 16 * t][d], col[t] = s.col[col0 + 16 * t][d];
      for (int r = 0; r < kHeld; ++r) {
        for (int c = 0; c < kHeld; ++c) sum[r][c] = fmaf(row[r] - col[c], row[r] - col[c], sum[r][c]);
      }
    }
    __syncthreads();
  }
  for (int r = 0; r < kHeld; ++r) {
    for (int c = 0; c < kHeld; ++c) {
      const int64_t i = row_first + row0 + 16 * r, j = col_first + col0 + 16 * c;
      if (i < tile.count && j < tile.count) args.out[tile.out + i * tile.count + j] = from_squared(args, tile, i, j, sum[r][c]);
    }
  }
}

// |a|^2 + |b|^2 of two points of a group as the metric has them: cosine's are of length 1, or 0.
__device__ inline float squared_lengths(const PairwiseArgs& args, double left, double right) {
  if (args.metric == Metric::kCosine) return float(left > 0.0) + float(right > 0.0);
  return float(left * left + right * right);
}

template <>
__global__ void pairwise_tile<uint16_t>(PairwiseArgs args) {
  AMPO_SHARED(PairwiseShared<uint16_t>, s);
  const Tile tile = args.tile[blockIdx.x];
  const int64_t row_first = int64_t(tile.row) * kSide, col_first = int64_t(tile.col) * kSide;
  const uint16_t* group = static_cast<const uint16_t*>(args.points) + tile.begin * args.dim;
  const auto rows_from = [&](int64_t first) {
    const int64_t left = tile.count - first;
    return Rows16(group + first * args.dim, int(left < kSide ? left : kSide), args.dim);
  };
  if (threadIdx.x == 0) s.num_near = 0;
  fill_gram<kSide, false>(rows_from(row_first), rows_from(col_first), s.gram);
  for (int e = threadIdx.x; e < kSide * kSide; e += kThreads) {
    const int64_t i = row_first + e / kSide, j = col_first + e % kSide;
    if (i >= tile.count || j >= tile.count) continue;
    const double left = args.length[tile.begin + i], right = args.length[tile.begin + j];
    const float lengths = squared_lengths(args, left, right);
    const double scale = args.metric != Metric::kCosine ? 1.0 : left > 0.0 && right > 0.0 ? 1.0 / (left * right) : 0.0;
    const float squared = lengths - 2.0f * float(double(s.gram[e / kSide][e % kSide]) * scale);
    if (i != j && !(squared > kClose * lengths)) s.pair[atomicAdd(&s.num_near, 1)] = int16_t(e);
    args.out[tile.out + i * tile.count + j] = from_squared(args, tile, i, j, squared);
  }
  __syncthreads();
  const Rows16 rows(group, int(tile.count), args.dim);
  for (int n = threadIdx.x / kWarp; n < s.num_near; n += kThreads / kWarp) {
    const int i = int(row_first) + s.pair[n] / kSide, j = int(col_first) + s.pair[n] % kSide;
    const float squared = squared_by_warp(rows, i, j, Unit(args, tile.begin + i), Unit(args, tile.begin + j));
    if (threadIdx.x % kWarp == 0) args.out[tile.out + i * tile.count + j] = from_squared(args, tile, i, j, squared);
  }
}

}  // namespace ampo
