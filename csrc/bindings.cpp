// The only file that knows Python: checks shapes, releases the GIL, calls. Everything here runs on the CPU.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "distance_kernels.h"
#include "kcenter.h"
#include "kmedoids.h"
#include "pairwise.h"
#include "select.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// float32 and float64 as they are; bfloat16 as the uint16 of its bits.
ampo::Points view_points(const py::array& points) {
  AMPO_CHECK(points.ndim() == 2, "points must be [n, E]");
  AMPO_CHECK(points.flags() & py::array::c_style, "points must be contiguous");
  const bool is_half = py::isinstance<py::array_t<uint16_t>>(points), is_single = py::isinstance<py::array_t<float>>(points);
  AMPO_CHECK(is_half || is_single || py::isinstance<py::array_t<double>>(points),
             "points must be float32, float64, or bfloat16 as uint16");
  const ampo::Dtype dtype =
      is_half ? ampo::Dtype::kBfloat16 : is_single ? ampo::Dtype::kFloat32 : ampo::Dtype::kFloat64;
  return {points.data(), dtype, points.shape(0), points.shape(1)};
}

int64_t checked_groups(const Array<int64_t>& offsets, int64_t total) {
  AMPO_CHECK(offsets.ndim() == 1 && offsets.size() >= 1, "offsets must be [groups + 1]");
  const int64_t num_groups = offsets.size() - 1;
  AMPO_CHECK(offsets.at(0) == 0 && offsets.at(num_groups) == total, "offsets must run from 0 to the number of points");
  for (int64_t g = 0; g < num_groups; ++g) AMPO_CHECK(offsets.at(g) <= offsets.at(g + 1), "offsets must not fall");
  return num_groups;
}

// Matrices of more entries than this (16 GiB in float32) are refused by name instead of by the allocator.
constexpr int64_t kMaxEntries = int64_t(1) << 32;

int64_t block_total(const Array<int64_t>& offsets, int64_t num_groups) {
  int64_t total = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t count = offsets.at(g + 1) - offsets.at(g);
    AMPO_CHECK(count < (int64_t(1) << 24) && total + count * count <= kMaxEntries,
               "the n x n distances would not fit into memory; use k_center, which streams over the points");
    total += count * count;
  }
  return total;
}

py::array pairwise(const py::array& points, const Array<int64_t>& offsets, int metric) {
  const ampo::Points view = view_points(points);
  const int64_t num_groups = checked_groups(offsets, view.count);
  const int64_t total = block_total(offsets, num_groups);
  const bool is_double = view.dtype == ampo::Dtype::kFloat64;
  py::array out = is_double ? py::array(py::array_t<double>(total)) : py::array(py::array_t<float>(total));
  void* target = out.mutable_data();
  py::gil_scoped_release release;
  ampo::pairwise_cpu(view, ampo::Metric(metric), offsets.data(), num_groups, target);
  return out;
}

py::array_t<int64_t> k_center(const py::array& points, int64_t k, const std::vector<int64_t>& seeds) {
  const ampo::Points view = view_points(points);
  AMPO_CHECK(1 <= k && k <= view.count && int64_t(seeds.size()) <= k, "k must be in 1 .. n, with no more seeds than k");
  for (const int64_t seed : seeds) AMPO_CHECK(0 <= seed && seed < view.count, "seeds must be in 0 .. n - 1");
  py::array_t<int64_t> chosen(k);
  int64_t* target = chosen.mutable_data();
  {
    py::gil_scoped_release release;
    ampo::kcenter_cpu(view, k, seeds, target);
  }
  return chosen;
}

std::vector<int64_t> k_medoids(const Array<double>& weighted, int64_t k, const std::vector<int64_t>& fixed) {
  AMPO_CHECK(weighted.ndim() == 2 && weighted.shape(0) == weighted.shape(1), "weighted distances must be [n, n]");
  const int64_t n = weighted.shape(0);
  AMPO_CHECK(1 <= k && k <= n && int64_t(fixed.size()) <= k, "k must be in 1 .. n, with no more fixed members than k");
  for (const int64_t index : fixed) AMPO_CHECK(0 <= index && index < n, "fixed members must be in 0 .. n - 1");
  py::gil_scoped_release release;
  ampo::Coverage problem;
  problem.num_clients = problem.num_facilities = n;
  problem.cost.assign(weighted.data(), weighted.data() + n * n);
  problem.round_costs(k);
  std::vector<int64_t> chosen = ampo::greedy_facilities(problem, k, fixed);
  ampo::swap_facilities(problem, int64_t(fixed.size()), chosen);
  return chosen;
}

py::tuple select_groups(const py::array& points, const Array<double>& reward, const Array<uint8_t>& valid,
                 const Array<uint8_t>& positive_ok, const Array<int64_t>& offsets, const Array<int64_t>& keys, int strategy,
                 int64_t k, int64_t num_positives, bool cover_positives, double tie_tol, uint64_t seed, double time_limit_s) {
  const ampo::Points view = view_points(points);
  const int64_t num_groups = checked_groups(offsets, view.count);
  AMPO_CHECK(reward.size() == view.count && valid.size() == view.count && positive_ok.size() == view.count,
             "reward, valid and positive_ok must have one entry a point");
  AMPO_CHECK(keys.size() == num_groups, "keys must have one entry a group");
  AMPO_CHECK(k >= 1 && num_positives >= 1, "k and positives must be at least 1");
  if (ampo::Strategy(strategy) == ampo::Strategy::kCoreset || ampo::Strategy(strategy) == ampo::Strategy::kOptSelect ||
      ampo::Strategy(strategy) == ampo::Strategy::kOptSelectExact) {
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t count = offsets.at(g + 1) - offsets.at(g);
      AMPO_CHECK(count < (int64_t(1) << 15), "a group is too large for this strategy's n x n distances; use k_center");
    }
  }
  py::array_t<int64_t> positive({num_groups, num_positives}), negative({num_groups, k});
  py::array_t<double> cost(num_groups), lower_bound(num_groups);
  py::array_t<uint8_t> proven(num_groups);
  const ampo::SelectInput input{view,          reward.data(),  valid.data(), positive_ok.data(),
                                offsets.data(), keys.data(), num_groups};
  const ampo::SelectOptions options{ampo::Strategy(strategy), k, num_positives, cover_positives, tie_tol, seed, time_limit_s};
  const ampo::SelectOutput output{positive.mutable_data(), negative.mutable_data(), cost.mutable_data(),
                                  lower_bound.mutable_data(), proven.mutable_data()};
  {
    py::gil_scoped_release release;
    ampo::select_cpu(input, options, output);
  }
  return py::make_tuple(positive, negative, cost, lower_bound, proven);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled selection: batched over ragged groups, GIL released, the same indices for any thread count.";
  m.def("vector_path", &ampo::vector_path, "The vector unit in use: avx512, avx2 or plain.");
  m.def("pairwise", &pairwise, py::arg("points"), py::arg("offsets"), py::arg("metric"),
        "Distances [sum N * N] of points [n, E] in groups by offsets [B + 1]; metric 0 euclidean, 1 squared, 2 cosine.");
  m.def("k_center", &k_center, py::arg("points"), py::arg("k"), py::arg("seeds"), "Farthest first -> int64 [k].");
  m.def("k_medoids", &k_medoids, py::arg("weighted"), py::arg("k"), py::arg("fixed"),
        "Local search; weighted[j, i] = weight_i * distance(i, j) -> k indices, the fixed ones first.");
  m.def("select", &select_groups, py::arg("points"), py::arg("reward"), py::arg("valid"), py::arg("positive_ok"),
        py::arg("offsets"), py::arg("keys"), py::arg("strategy"), py::arg("k"), py::arg("num_positives"),
        py::arg("cover_positives"), py::arg("tie_tol"), py::arg("seed"), py::arg("time_limit_s"),
        "-> (positive [B, P], negative [B, k], cost [B], lower_bound [B], proven [B]); strategies in select.h's order.");
}
