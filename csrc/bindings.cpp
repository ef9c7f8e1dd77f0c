// The only file that knows Python: checks shapes, releases the GIL, calls.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "check.h"
#include "kmedoids.h"
#include "pairwise.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

int64_t checked_groups(const Array<int64_t>& offsets, int64_t total) {
  AMPO_CHECK(offsets.ndim() == 1 && offsets.size() >= 1, "offsets must be [groups + 1]");
  const int64_t num_groups = offsets.size() - 1;
  AMPO_CHECK(offsets.at(0) == 0 && offsets.at(num_groups) == total, "offsets must run from 0 to the number of points");
  for (int64_t g = 0; g < num_groups; ++g) AMPO_CHECK(offsets.at(g) <= offsets.at(g + 1), "offsets must not fall");
  return num_groups;
}

int64_t block_total(const Array<int64_t>& offsets, int64_t num_groups) {
  int64_t total = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t count = offsets.at(g + 1) - offsets.at(g);
    AMPO_CHECK(count < (int64_t(1) << 24), "a group's distance matrix would not fit; use k_center on the points");
    total += count * count;
  }
  return total;
}

py::array_t<float> pairwise(const Array<float>& points, const Array<int64_t>& offsets) {
  AMPO_CHECK(points.ndim() == 2, "points must be [n, E]");
  const int64_t num_groups = checked_groups(offsets, points.shape(0));
  py::array_t<float> out(block_total(offsets, num_groups));
  float* target = out.mutable_data();
  {
    py::gil_scoped_release release;
    ampo::pairwise_cpu(points.data(), points.shape(1), offsets.data(), num_groups, target);
  }
  return out;
}

py::tuple kmedoids_swap(const Array<float>& distances, const Array<double>& weights, const Array<uint8_t>& eligible,
                        const Array<int64_t>& offsets, const Array<int64_t>& start) {
  const int64_t total = weights.size();
  const int64_t num_groups = checked_groups(offsets, total);
  AMPO_CHECK(eligible.size() == total, "eligible and weights must have one entry a point");
  AMPO_CHECK(distances.size() == block_total(offsets, num_groups), "distances must be one [N, N] block a group");
  AMPO_CHECK(start.ndim() == 2 && start.shape(0) == num_groups, "start must be [groups, k]");
  const int64_t k = start.shape(1);
  py::array_t<int64_t> chosen({num_groups, k});
  py::array_t<double> cost(num_groups);
  int64_t* rows = chosen.mutable_data();
  std::copy(start.data(), start.data() + start.size(), rows);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t count = offsets.at(g + 1) - offsets.at(g);
    for (int64_t s = 0; s < k; ++s) AMPO_CHECK(rows[g * k + s] < count, "start holds an index beyond its group");
  }
  double* costs = cost.mutable_data();
  {
    py::gil_scoped_release release;
    ampo::kmedoids_swap_cpu(distances.data(), weights.data(), eligible.data(), offsets.data(), num_groups, k, rows, costs);
  }
  return py::make_tuple(chosen, cost);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled selection: batched over ragged groups, GIL released, the same indices for any thread count.";
  m.def("pairwise", &pairwise, py::arg("points"), py::arg("offsets"),
        "Euclidean distances [sum N * N] float32 of points [n, E] in groups by offsets [B + 1].");
  m.def("kmedoids_swap", &kmedoids_swap, py::arg("distances"), py::arg("weights"), py::arg("eligible"),
        py::arg("offsets"), py::arg("start"), "Single-swap local search from start [B, k] -> (chosen [B, k], cost [B]).");
}
