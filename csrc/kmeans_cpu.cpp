#include "kmeans.h"

#include <algorithm>
#include <cmath>

#include "exact_scale.h"

namespace ampo {
namespace {

constexpr int kMaxRounds = 100;

std::vector<int64_t> plus_plus_start(const std::vector<double>& squared, int64_t count, int64_t k, const Random& random) {
  std::vector<int64_t> centers{int64_t(random.uniform(0) * double(count))};
  std::vector<double> nearest(squared.begin() + centers[0] * count, squared.begin() + (centers[0] + 1) * count);
  while (int64_t(centers.size()) < k) {
    double total = 0.0;
    for (const double value : nearest) total += value;
    if (total == 0.0) break;
    const double threshold = random.uniform(centers.size()) * total;
    double sum = 0.0;
    int64_t pick = -1;
    for (int64_t i = 0; i < count && !(sum > threshold); ++i) {
      sum += nearest[i];
      if (nearest[i] > 0.0) pick = i;  // the last one where the product rounded up to the total
    }
    centers.push_back(pick);
    for (int64_t i = 0; i < count; ++i) nearest[i] = std::min(nearest[i], squared[pick * count + i]);
  }
  return centers;
}

// [count, clusters] squared distances to the means
void to_means(const std::vector<double>& squared, int64_t count, const std::vector<int64_t>& label, int64_t clusters,
              std::vector<double>& distance) {
  std::vector<double> size(clusters, 0.0), within(clusters, 0.0);
  distance.assign(count * clusters, 0.0);
  for (int64_t j = 0; j < count; ++j) {
    size[label[j]] += 1.0;
    for (int64_t i = 0; i < count; ++i) distance[i * clusters + label[j]] += squared[j * count + i];
  }
  for (int64_t i = 0; i < count; ++i) within[label[i]] += distance[i * clusters + label[i]];
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < clusters; ++c) {
      double& value = distance[i * clusters + c];
      value = value / size[c] - within[c] / (2.0 * size[c] * size[c]);
    }
  }
}

void fill_empty(const std::vector<double>& distance, int64_t count, int64_t clusters, std::vector<int64_t>& label) {
  std::vector<int64_t> size(clusters, 0);
  std::vector<double> own(count);
  for (int64_t i = 0; i < count; ++i) {
    ++size[label[i]];
    own[i] = distance[i * clusters + label[i]];
  }
  for (int64_t c = 0; c < clusters; ++c) {
    if (size[c] > 0) continue;
    int64_t moved = -1;
    for (int64_t i = 0; i < count; ++i) {
      if (size[label[i]] > 1 && (moved < 0 || own[i] > own[moved])) moved = i;
    }
    --size[label[moved]];
    label[moved] = c;
    size[c] = 1;
  }
}

void assign(const std::vector<double>& distance, int64_t count, int64_t clusters, std::vector<int64_t>& label) {
  for (int64_t i = 0; i < count; ++i) {
    const double* row = distance.data() + i * clusters;
    label[i] = std::min_element(row, row + clusters) - row;
  }
  fill_empty(distance, count, clusters, label);
}

}  // namespace

std::vector<int64_t> kmeans_clusters(const double* squared, int64_t count, int64_t k, const Random& random,
                                     int64_t* num_clusters) {
  std::vector<double> rounded(squared, squared + count * count);
  const double scale = exact_scale(*std::max_element(rounded.begin(), rounded.end()), double(count) * double(count));
  for (double& value : rounded) value = std::nearbyint(value * scale);
  const std::vector<int64_t> centers = plus_plus_start(rounded, count, k, random);
  const int64_t clusters = int64_t(centers.size());
  *num_clusters = clusters;
  std::vector<double> distance(count * clusters);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < clusters; ++c) distance[i * clusters + c] = rounded[centers[c] * count + i];
  }
  std::vector<int64_t> label(count), previous;
  assign(distance, count, clusters, label);
  for (int round = 0; round < kMaxRounds && label != previous; ++round) {
    previous = label;
    to_means(rounded, count, label, clusters, distance);
    assign(distance, count, clusters, label);
  }
  return label;
}

}  // namespace ampo
