// Inner products of bfloat16 rows by the tensor cores, and the squared distances that they give.
//
// |a|^2 + |b|^2 - 2 ab loses the digits of near points: pairs whose result is small against their lengths are computed again
// from their differences. What is kept has a relative error of at most kClose^-1 times that of the products' sums.
#pragma once

#include <cstdint>

#include "cuda_block.cuh"

namespace ampo {

#ifdef __CUDACC__
// sum += a b: a 16 x 16 by rows, b 16 x 8 by columns, spread over the warp as PTX's mma.m16n8k16 has it.
__device__ inline void warp_mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // require_bfloat16_cores keeps older devices out
#endif
}
#endif

constexpr int kQuad = 32;           // rows and columns of the products that one warp holds
constexpr float kClose = 1.0f / 64;  // of |a|^2 + |b|^2: below it a squared distance is computed from differences

// A quarter of 32 neighbouring numbers of each of 32 rows: the lane's 8, in pairs.
struct QuadRows {
  uint32_t pair[kQuad / 8][4];
};

struct Rows16 {
  const uint16_t* first;
  int count;
  int dim;
  bool is_aligned;  // every eighth number lies on 16 bytes

  __device__ Rows16(const uint16_t* first, int count, int64_t dim)
      : first(first), count(count), dim(int(dim)), is_aligned(dim % 8 == 0 && reinterpret_cast<uintptr_t>(first) % 16 == 0) {}

  // Zeros beyond the rows and beyond dim.
  __device__ void take8(int row, int d, uint32_t (&pair)[4]) const {
    for (int p = 0; p < 4; ++p) pair[p] = 0;
    if (row >= count || d >= dim) return;
    const uint16_t* at = first + int64_t(row) * dim + d;
    if (is_aligned) {
      const auto four = *reinterpret_cast<const Chunk<uint32_t, 4>*>(at);
      for (int p = 0; p < 4; ++p) pair[p] = four.value[p];
      return;
    }
    for (int e = 0; e < 8 && d + e < dim; ++e) pair[e / 2] |= uint32_t(at[e]) << (16 * (e % 2));
  }

  __device__ void take(int row, int d, QuadRows& into) const {
    const int lane = threadIdx.x % kWarp;
    for (int b = 0; b < kQuad / 8; ++b) take8(row + 8 * b + lane / 4, d + 8 * (lane % 4), into.pair[b]);
  }
};

// Adds the products of 32 rows by 32 columns over 32 dimensions. In which order the dimensions are taken does not matter as
// long as rows and columns take the same.
__device__ inline void multiply(const QuadRows& rows, const QuadRows& cols, float (&sum)[2][4][4]) {
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 2; ++i) {
      const uint32_t a[4] = {rows.pair[2 * i][2 * half], rows.pair[2 * i + 1][2 * half], rows.pair[2 * i][2 * half + 1],
                             rows.pair[2 * i + 1][2 * half + 1]};
      for (int j = 0; j < 4; ++j) {
        const uint32_t b[2] = {cols.pair[j][2 * half], cols.pair[j][2 * half + 1]};
        warp_mma(sum[i][j], a, b);
      }
    }
  }
}

// gram[i][j] = row_i . col_j for a block of kSize x kSize, float32 sums, always in the same order. kSame: the columns are the rows.
template <int kSize, bool kSame>
__device__ void fill_gram(const Rows16& rows, const Rows16& cols, float (*gram)[kSize + 1]) {
  constexpr int kSide = kSize / kQuad, kSplits = kThreads / kWarp / (kSide * kSide);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, split = warp / (kSide * kSide);
  const int row0 = warp / kSide % kSide * kQuad, col0 = warp % kSide * kQuad;
  float sum[2][4][4] = {};
  // Every warp goes the same number of rounds, the last ones with zeros.
  for (int d = split * 32; d - split * 32 < rows.dim; d += kSplits * 32) {
    QuadRows mine, theirs;
    rows.take(row0, d, mine);
    if (!kSame || kSide > 1) cols.take(col0, d, theirs);
    multiply(mine, kSame && kSide == 1 ? mine : theirs, sum);
  }
  for (int turn = 0; turn < kSplits; ++turn) {
    if (turn == split) {
      for (int e = 0; e < 32; ++e) {
        const int i = e / 16, j = e / 4 % 4, c = e % 4;
        float& out = gram[row0 + 16 * i + lane / 4 + 8 * (c / 2)][col0 + 8 * j + 2 * (lane % 4) + c % 2];
        out = turn == 0 ? sum[i][j][c] : out + sum[i][j][c];
      }
    }
    __syncthreads();
  }
}

// The squared distance of rows i and j by their differences, a warp at one pair: the same value in each of its threads, always
// summed in the same order. unit_i and unit_j make coordinates of the rows' numbers.
template <typename UnitI, typename UnitJ>
__device__ float squared_by_warp(const Rows16& rows, int i, int j, UnitI unit_i, UnitJ unit_j) {
  constexpr int kAhead = 4;  // loads of each row that are on their way at the same time
  float sum = 0.0f;
  for (int begin = 8 * int(threadIdx.x % kWarp); begin < rows.dim; begin += kAhead * 8 * kWarp) {
    uint32_t left[kAhead][4], right[kAhead][4];
    for (int a = 0; a < kAhead; ++a) {
      rows.take8(i, begin + a * 8 * kWarp, left[a]);
      rows.take8(j, begin + a * 8 * kWarp, right[a]);
    }
    for (int e = 0; e < kAhead * 8; ++e) {
      const int shift = 16 * (e % 2);
      const float difference = unit_i(as_float(uint16_t(left[e / 8][e % 8 / 2] >> shift))) -
                               unit_j(as_float(uint16_t(right[e / 8][e % 8 / 2] >> shift)));
      sum = fmaf(difference, difference, sum);
    }
  }
  return warp_sum(sum);
}

}  // namespace ampo
