#include "pairwise.h"

#include <cmath>
#include <vector>

namespace ampo {
namespace {

constexpr int kLanes = 8;  // independent accumulators: vectorises without reordering any sum between builds

double squared_distance(const float* a, const float* b, int64_t dim) {
  double lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const double difference = double(a[d + lane]) - double(b[d + lane]);
      lanes[lane] += difference * difference;
    }
  }
  for (; d < dim; ++d) {
    const double difference = double(a[d]) - double(b[d]);
    lanes[d % kLanes] += difference * difference;
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

void one_group(const float* points, int64_t dim, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i * count + i] = 0.0f;
    for (int64_t j = i + 1; j < count; ++j) {
      const float distance = float(std::sqrt(squared_distance(points + i * dim, points + j * dim, dim)));
      out[i * count + j] = distance;
      out[j * count + i] = distance;
    }
  }
}

}  // namespace

void pairwise_cpu(const float* points, int64_t dim, const int64_t* offsets, int64_t num_groups, float* out) {
  std::vector<int64_t> block(num_groups + 1, 0);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t count = offsets[g + 1] - offsets[g];
    block[g + 1] = block[g] + count * count;
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t g = 0; g < num_groups; ++g) {
    one_group(points + offsets[g] * dim, dim, offsets[g + 1] - offsets[g], out + block[g]);
  }
}

}  // namespace ampo
