// Squared Euclidean distances of a few rows to a few rows: the one inner loop under every distance.
//
// Differences are squared, never inner products subtracted: points 1e-4 apart at norm 100 keep their digits, equal points
// are exactly 0 apart, and d(a, b) == d(b, a) bit for bit. A pair's sum runs over the dimensions in one fixed order, the
// same in every block shape, so a result depends neither on blocking nor on threads (it does on the vector width).
#pragma once

#include <cstdint>

namespace ampo {

constexpr int kMaxRows = 2;  // 2 x 4 accumulators, their 6 operands and a temporary fit the 16 AVX registers
constexpr int kMaxCols = 4;

// out[r * kMaxCols + c] = ||row_r - col_c||^2, 1 <= num_rows <= kMaxRows, 1 <= num_cols <= kMaxCols
template <typename T>
using SquaredBlock = void (*)(const T* const* rows, int num_rows, const T* const* cols, int num_cols, int64_t dim, T* out);

// The widest kernel that this machine runs (simd.h).
template <typename T>
SquaredBlock<T> squared_block();

// out[j] = ||row - others[j]||^2, j < count
template <typename T>
void squared_to_many(const T* row, const T* const* others, int64_t count, int64_t dim, T* out);

}  // namespace ampo
