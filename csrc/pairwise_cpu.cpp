#include "pairwise.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "distance_kernels.h"
#include "first_error.h"

namespace ampo {
namespace {

// A tile of rows meets a tile of columns while both lie in the first-level cache.
constexpr int64_t kTile = 16;

template <typename T>
T from_squared(T squared, Metric metric) {
  return metric == Metric::kEuclidean ? std::sqrt(squared) : metric == Metric::kCosine ? squared / T(2) : squared;
}

template <typename T, typename Out>
void one_tile(const T* const* rows, int64_t count, int64_t dim, Metric metric, int64_t i0, int64_t j0, Out* out) {
  const SquaredBlock<T> kernel = squared_block<T>();
  T squared[kMaxRows * kMaxCols];
  const int64_t i1 = std::min(i0 + kTile, count), j1 = std::min(j0 + kTile, count);
  for (int64_t i = i0; i < i1; i += kMaxRows) {
    const int num_rows = int(std::min<int64_t>(kMaxRows, i1 - i));
    // On the diagonal tile the columns left of the row are already there by symmetry.
    for (int64_t j = i0 == j0 ? i : j0; j < j1; j += kMaxCols) {
      const int num_cols = int(std::min<int64_t>(kMaxCols, j1 - j));
      kernel(rows + i, num_rows, rows + j, num_cols, dim, squared);
      for (int r = 0; r < num_rows; ++r) {
        for (int c = 0; c < num_cols; ++c) {
          const Out distance = Out(from_squared(squared[r * kMaxCols + c], metric));
          out[(i + r) * count + j + c] = distance;
          out[(j + c) * count + i + r] = distance;
        }
      }
    }
  }
}

template <typename T>
void make_unit(Rows<T>& rows, int64_t dim, std::vector<T>& unit, std::vector<uint8_t>& is_zero) {
  const int64_t count = int64_t(rows.row.size());
  unit.resize(count * dim);
  is_zero.assign(count, 0);
  for (int64_t i = 0; i < count; ++i) {
    double top = 0.0, sum = 0.0;
    for (int64_t d = 0; d < dim; ++d) top = std::max(top, std::abs(double(rows.row[i][d])));
    is_zero[i] = top == 0.0;
    if (is_zero[i]) top = 1.0;  // squares of numbers up to 1, whatever the length
    for (int64_t d = 0; d < dim; ++d) sum += (rows.row[i][d] / top) * (rows.row[i][d] / top);
    const double length = is_zero[i] ? 1.0 : std::sqrt(sum);
    for (int64_t d = 0; d < dim; ++d) unit[i * dim + d] = T(rows.row[i][d] / top / length);
    rows.row[i] = unit.data() + i * dim;
  }
}

template <typename T>
void all_groups(const Points& points, Metric metric, const int64_t* offsets, int64_t num_groups, T* out) {
  std::vector<int64_t> block(num_groups + 1, 0);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t count = offsets[g + 1] - offsets[g];
    block[g + 1] = block[g] + count * count;
  }
  FirstError error;
#pragma omp parallel if (num_groups > 1)
  {
    Rows<T> rows;
    std::vector<T> unit;
    std::vector<uint8_t> is_zero;
#pragma omp for schedule(dynamic, 4)
    for (int64_t g = 0; g < num_groups; ++g) {
      error.keep([&] {
        const int64_t count = offsets[g + 1] - offsets[g];
        rows.take(points, offsets[g], count);
        if (metric == Metric::kCosine) make_unit(rows, points.dim, unit, is_zero);
        T* target = out + block[g];
        pairwise_rows(rows.row.data(), count, points.dim, metric, target);
        if (metric != Metric::kCosine) return;
        for (int64_t e = 0; e < count * count; ++e) {
          if (is_zero[e / count] != is_zero[e % count]) target[e] = T(1);
        }
      });
    }
  }
  error.rethrow();
}

}  // namespace

template <typename T, typename Out>
void pairwise_rows(const T* const* rows, int64_t count, int64_t dim, Metric metric, Out* out) {
  const int64_t num_tiles = (count + kTile - 1) / kTile;
  // One group may be the whole call: its tiles then share the threads (inside a parallel region this loop is serial).
#pragma omp parallel for schedule(dynamic, 1) if (num_tiles >= 16)
  for (int64_t ti = 0; ti < num_tiles; ++ti) {
    for (int64_t tj = ti; tj < num_tiles; ++tj) one_tile(rows, count, dim, metric, ti * kTile, tj * kTile, out);
  }
  for (int64_t i = 0; i < count; ++i) out[i * count + i] = Out(0);
}

void pairwise_cpu(const Points& points, Metric metric, const int64_t* offsets, int64_t num_groups, void* out) {
  if (points.dtype == Dtype::kFloat64) {
    all_groups<double>(points, metric, offsets, num_groups, static_cast<double*>(out));
  } else {
    all_groups<float>(points, metric, offsets, num_groups, static_cast<float*>(out));
  }
}

template void pairwise_rows(const float* const*, int64_t, int64_t, Metric, float*);
template void pairwise_rows(const float* const*, int64_t, int64_t, Metric, double*);
template void pairwise_rows(const double* const*, int64_t, int64_t, Metric, double*);

}  // namespace ampo
