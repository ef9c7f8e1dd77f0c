// A view of stacked points as they came in: float32, bfloat16 (its 16 bits) or float64, and rows of it as numbers to
// compute with (float for the first two, double for the third).
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace ampo {

enum class Dtype { kFloat32, kBfloat16, kFloat64 };

struct Points {
  const void* data;  // [count, dim] row-major
  Dtype dtype;
  int64_t count;
  int64_t dim;
};

// A bfloat16 is the upper half of a float32.
inline void widen_bfloat16(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

// Pointers to rows of Points; bfloat16 rows are widened into `storage`, which is reused from call to call.
template <typename T>
struct Rows {
  std::vector<const T*> row;
  std::vector<T> storage;

  void take(const Points& points, int64_t begin, int64_t count) {
    row.resize(count);
    const T* base = static_cast<const T*>(points.data) + begin * points.dim;
    if (points.dtype == Dtype::kBfloat16) {
      if constexpr (sizeof(T) == sizeof(float)) {
        storage.resize(count * points.dim);
        widen_bfloat16(static_cast<const uint16_t*>(points.data) + begin * points.dim, count * points.dim, storage.data());
      }
      base = storage.data();
    }
    for (int64_t i = 0; i < count; ++i) row[i] = base + i * points.dim;
  }
};

}  // namespace ampo
