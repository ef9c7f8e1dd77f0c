#include "kcenter.h"

#include <algorithm>
#include <limits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "distance_kernels.h"
#include "first_error.h"

namespace ampo {
namespace {

template <typename T>
struct Entry {
  T bound;  // squared distance to the nearest of the first `seen` chosen points
  int64_t index;
  int64_t seen;

  // Heap order: the largest bound on top, the lowest index among equals.
  bool operator<(const Entry& other) const {
    return bound != other.bound ? bound < other.bound : index > other.index;
  }
};

template <typename T>
class Pool {
 public:
  Pool(const Points& points, int64_t k) : points_(points) {
    center_storage_.resize(k * points.dim);
    for (int64_t c = 0; c < k; ++c) center_.push_back(center_storage_.data() + c * points.dim);
  }

  void run(int64_t k, std::vector<int64_t> first, int64_t* chosen) {
    for (const int64_t index : first) add_center(index);
    fill_heaps(first);
    std::copy(first.begin(), first.end(), chosen);
    for (int64_t c = int64_t(first.size()); c < k; ++c) {
      chosen[c] = farthest();
      if (c + 1 < k) add_center(chosen[c]);
    }
  }

 private:
  const T* row(int64_t index, std::vector<T>& widened) const {
    if (points_.dtype != Dtype::kBfloat16) return static_cast<const T*>(points_.data) + index * points_.dim;
    widened.resize(points_.dim);
    if constexpr (sizeof(T) == sizeof(float)) {
      widen_bfloat16(static_cast<const uint16_t*>(points_.data) + index * points_.dim, points_.dim, widened.data());
    }
    return widened.data();
  }

  void add_center(int64_t index) {
    std::vector<T> widened;
    const T* source = row(index, widened);
    std::copy(source, source + points_.dim, center_storage_.data() + num_centers_ * points_.dim);
    ++num_centers_;
  }

  void refresh(Entry<T>& entry, std::vector<T>& widened, std::vector<T>& squared) const {
    const int64_t count = num_centers_ - entry.seen;
    squared.resize(count);
    squared_to_many(row(entry.index, widened), center_.data() + entry.seen, count, points_.dim, squared.data());
    entry.bound = std::min(entry.bound, *std::min_element(squared.begin(), squared.end()));
    entry.seen = num_centers_;
  }

  void fill_heaps(const std::vector<int64_t>& first) {
    std::vector<uint8_t> is_chosen(points_.count, 0);
    for (const int64_t index : first) is_chosen[index] = 1;
    const int64_t num_parts = parts();
    heaps_.resize(num_parts);
    FirstError error;
#pragma omp parallel for schedule(static, 1) num_threads(num_parts)
    for (int64_t p = 0; p < num_parts; ++p) {
      error.keep([&] { fill_heap(heaps_[p], points_.count * p / num_parts, points_.count * (p + 1) / num_parts, is_chosen); });
    }
    error.rethrow();
  }

  void fill_heap(std::vector<Entry<T>>& heap, int64_t begin, int64_t end, const std::vector<uint8_t>& is_chosen) const {
    std::vector<T> widened, squared;
    for (int64_t i = begin; i < end; ++i) {
      if (is_chosen[i]) continue;
      heap.push_back({std::numeric_limits<T>::infinity(), i, 0});
      refresh(heap.back(), widened, squared);
    }
    std::make_heap(heap.begin(), heap.end());
  }

  // Brings the top of one part up to date; stops early once another part has a farther point.
  void settle(std::vector<Entry<T>>& heap, const T& farthest_elsewhere) const {
    std::vector<T> widened, squared;
    while (!heap.empty() && heap.front().seen < num_centers_ && !(heap.front().bound < farthest_elsewhere)) {
      refresh(heap.front(), widened, squared);
      sift_down(heap);
    }
  }

  static void sift_down(std::vector<Entry<T>>& heap) {
    const Entry<T> moved = heap.front();
    size_t hole = 0;
    for (size_t child = 1; child < heap.size(); child = 2 * hole + 1) {
      if (child + 1 < heap.size() && heap[child] < heap[child + 1]) ++child;
      if (!(moved < heap[child])) break;
      heap[hole] = heap[child];
      hole = child;
    }
    heap[hole] = moved;
  }

  int64_t farthest() {
    const int64_t num_parts = int64_t(heaps_.size());
    T best_so_far = -std::numeric_limits<T>::infinity();
    FirstError error;
#pragma omp parallel for schedule(static, 1) num_threads(num_parts) if (num_parts > 1)
    for (int64_t p = 0; p < num_parts; ++p) {
      T elsewhere;
#pragma omp atomic read
      elsewhere = best_so_far;
      error.keep([&] { settle(heaps_[p], elsewhere); });
      const bool is_current = !heaps_[p].empty() && heaps_[p].front().seen == num_centers_;
      if (!is_current) continue;
#pragma omp critical(ampo_kcenter_best)
      if (heaps_[p].front().bound > best_so_far) best_so_far = heaps_[p].front().bound;
    }
    error.rethrow();
    // A part that stopped early holds a stale top below the best: it cannot win, and the order by (bound, index) decides.
    int64_t winner = -1;
    for (int64_t p = 0; p < num_parts; ++p) {
      if (heaps_[p].empty() || heaps_[p].front().seen != num_centers_) continue;
      if (winner < 0 || heaps_[winner].front() < heaps_[p].front()) winner = p;
    }
    const int64_t index = heaps_[winner].front().index;
    std::pop_heap(heaps_[winner].begin(), heaps_[winner].end());
    heaps_[winner].pop_back();
    return index;
  }

  int64_t parts() const {
#ifdef _OPENMP
    return std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), points_.count / 64));
#else
    return 1;
#endif
  }

  const Points points_;
  std::vector<T> center_storage_;
  std::vector<const T*> center_;
  int64_t num_centers_ = 0;
  std::vector<std::vector<Entry<T>>> heaps_;
};

}  // namespace

void kcenter_cpu(const Points& points, int64_t k, const std::vector<int64_t>& seeds, int64_t* chosen) {
  const std::vector<int64_t> first = seeds.empty() ? std::vector<int64_t>{0} : seeds;
  if (points.dtype == Dtype::kFloat64) {
    Pool<double>(points, k).run(k, first, chosen);
  } else {
    Pool<float>(points, k).run(k, first, chosen);
  }
}

}  // namespace ampo
