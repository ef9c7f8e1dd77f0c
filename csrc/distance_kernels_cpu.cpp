#include "distance_kernels.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace ampo {
namespace {

template <typename T, int kBytes, int kRows, int kCols>
AMPO_INLINE void block(const T* const* rows, const T* const* cols, int64_t dim, T* out) {
  using V = typename Vector<T, kBytes>::Type;
  constexpr int kLanes = Vector<T, kBytes>::kLanes;
  V sum[kRows][kCols] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    V col[kCols];
    for (int c = 0; c < kCols; ++c) std::memcpy(&col[c], cols[c] + d, kBytes);
    for (int r = 0; r < kRows; ++r) {
      V row;
      std::memcpy(&row, rows[r] + d, kBytes);
      for (int c = 0; c < kCols; ++c) {
        const V difference = row - col[c];
        sum[r][c] += difference * difference;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) {
      T lanes[kLanes];
      std::memcpy(lanes, &sum[r][c], kBytes);
      for (int64_t rest = d; rest < dim; ++rest) {
        const T difference = rows[r][rest] - cols[c][rest];
        lanes[rest - d] += difference * difference;
      }
      for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
      }
      out[r * kMaxCols + c] = lanes[0];
    }
  }
}

template <typename T, int kBytes, int kRows>
AMPO_INLINE void block_cols(const T* const* rows, const T* const* cols, int num_cols, int64_t dim, T* out) {
  switch (num_cols) {
    case 1: return block<T, kBytes, kRows, 1>(rows, cols, dim, out);
    case 2: return block<T, kBytes, kRows, 2>(rows, cols, dim, out);
    case 3: return block<T, kBytes, kRows, 3>(rows, cols, dim, out);
    default: return block<T, kBytes, kRows, 4>(rows, cols, dim, out);
  }
}

template <typename T, int kBytes>
AMPO_INLINE void block_any(const T* const* rows, int num_rows, const T* const* cols, int num_cols, int64_t dim, T* out) {
  if (num_rows == 1) return block_cols<T, kBytes, 1>(rows, cols, num_cols, dim, out);
  return block_cols<T, kBytes, 2>(rows, cols, num_cols, dim, out);
}

template <typename T>
void plain(const T* const* rows, int num_rows, const T* const* cols, int num_cols, int64_t dim, T* out) {
  block_any<T, 16>(rows, num_rows, cols, num_cols, dim, out);
}

#ifdef AMPO_X86
template <typename T>
__attribute__((target("avx2,fma"))) void avx2(const T* const* rows, int num_rows, const T* const* cols, int num_cols,
                                              int64_t dim, T* out) {
  block_any<T, 32>(rows, num_rows, cols, num_cols, dim, out);
}

template <typename T>
__attribute__((target("avx512f,fma"))) void avx512(const T* const* rows, int num_rows, const T* const* cols,
                                                   int num_cols, int64_t dim, T* out) {
  block_any<T, 64>(rows, num_rows, cols, num_cols, dim, out);
}
#endif

}  // namespace

template <typename T>
SquaredBlock<T> squared_block() {
#ifdef AMPO_X86
  if (simd() == Simd::kAvx512) return avx512<T>;
  if (simd() == Simd::kAvx2) return avx2<T>;
#endif
  return plain<T>;
}

template <typename T>
void squared_to_many(const T* row, const T* const* others, int64_t count, int64_t dim, T* out) {
  const SquaredBlock<T> kernel = squared_block<T>();
  T buffer[kMaxRows * kMaxCols];
  for (int64_t j = 0; j < count; j += kMaxCols) {
    const int num_cols = int(std::min<int64_t>(kMaxCols, count - j));
    kernel(&row, 1, others + j, num_cols, dim, buffer);
    std::copy(buffer, buffer + num_cols, out + j);
  }
}

template SquaredBlock<float> squared_block<float>();
template SquaredBlock<double> squared_block<double>();
template void squared_to_many(const float*, const float* const*, int64_t, int64_t, float*);
template void squared_to_many(const double*, const double* const*, int64_t, int64_t, double*);

}  // namespace ampo
