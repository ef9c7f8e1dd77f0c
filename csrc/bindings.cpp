// The only file that knows Python: checks shapes, releases the GIL, calls. CUDA memory and streams come in as integers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "few_rows.h"
#include "kcenter.h"
#include "kmedoids.h"
#include "pairwise.h"
#include "select.h"
#include "simd.h"

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
  const auto fill = [&] { problem.cost.assign(weighted.data(), weighted.data() + n * n); };
  fill();
  problem.round_costs(k);
  std::vector<int64_t> chosen = ampo::greedy_facilities(problem, k, fixed);
  double cost;
  do cost = ampo::swap_facilities(problem, int64_t(fixed.size()), chosen);
  while (problem.sharpen(k, chosen, cost, fill));
  return chosen;
}

py::tuple select_groups(const py::array& points, const Array<double>& reward, const Array<uint8_t>& valid,
                        const Array<uint8_t>& positive_ok, const Array<int64_t>& offsets, const Array<int64_t>& keys,
                        int strategy, int64_t k, int64_t num_positives, bool cover_positives, double tie_tol, uint64_t seed,
                        double time_limit_s) {
  const ampo::Points view = view_points(points);
  const int64_t num_groups = checked_groups(offsets, view.count);
  AMPO_CHECK(reward.size() == view.count && valid.size() == view.count && positive_ok.size() == view.count,
             "reward, valid and positive_ok must have one entry a point");
  AMPO_CHECK(keys.size() == num_groups, "keys must have one entry a group");
  const ampo::SelectInput input{view, reward.data(), valid.data(), positive_ok.data(), offsets.data(), keys.data(), num_groups};
  AMPO_CHECK(k >= 1 && num_positives >= 1, "k and positives must be at least 1");
  const ampo::SelectOptions options{ampo::Strategy(strategy), k, num_positives, cover_positives, tie_tol, seed, time_limit_s};
  const bool has_matrix = options.strategy == ampo::Strategy::kCoreset || options.strategy == ampo::Strategy::kOptSelect ||
                          options.strategy == ampo::Strategy::kOptSelectExact;
  AMPO_CHECK(!has_matrix || ampo::largest_group(input) < (int64_t(1) << 15),
             "a group is too large for this strategy's n x n distances; use k_center");
  py::array_t<int64_t> positive({input.num_groups, num_positives}), negative({input.num_groups, k});
  py::array_t<double> cost(input.num_groups), lower_bound(input.num_groups);
  py::array_t<uint8_t> proven(input.num_groups);
  const ampo::SelectOutput output{positive.mutable_data(), negative.mutable_data(), cost.mutable_data(),
                                  lower_bound.mutable_data(), proven.mutable_data()};
  {
    // An exact search can take for ever: Ctrl-C ends it.
    const auto is_interrupted = [] {
      py::gil_scoped_acquire acquire;
      return PyErr_CheckSignals() != 0;
    };
    py::gil_scoped_release release;
    ampo::select_cpu(input, options, output, is_interrupted);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return py::make_tuple(positive, negative, cost, lower_bound, proven);
}

using Floats = py::array_t<float, py::array::c_style>;  // never converted: a weight would be copied at every call

Floats few_rows(const Floats& x, const Floats& weight, const std::optional<Floats>& bias) {
  AMPO_CHECK(x.ndim() == 2 && weight.ndim() == 2 && x.shape(1) == weight.shape(1), "x must be [rows, dim], weight [outputs, dim]");
  const int64_t num_rows = x.shape(0), num_outputs = weight.shape(0), dim = x.shape(1);
  AMPO_CHECK(!bias || bias->size() == num_outputs, "bias must have one entry an output");
  Floats out({num_rows, num_outputs});
  float* target = out.mutable_data();
  {
    py::gil_scoped_release release;
    ampo::few_rows_cpu(x.data(), num_rows, weight.data(), bias ? bias->data() : nullptr, num_outputs, dim, target);
  }
  return out;
}

#ifdef AMPO_HAS_CUDA
// The arguments ending in _pointer and `stream` are addresses: torch's data_ptr() and cuda_stream.
template <typename T>
T* device(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

ampo::Points view_device(uintptr_t pointer, bool is_bfloat16, int64_t count, int64_t dim) {
  AMPO_CHECK(dim < int64_t(1) << 30, "a point has too many dimensions: the kernels count them in 32 bits");
  return {device<const void>(pointer), is_bfloat16 ? ampo::Dtype::kBfloat16 : ampo::Dtype::kFloat32, count, dim};
}

void pairwise_cuda(uintptr_t pointer, bool is_bfloat16, int64_t count, int64_t dim, const Array<int64_t>& offsets, int metric,
                   uintptr_t out_pointer, uintptr_t stream) {
  const int64_t num_groups = checked_groups(offsets, count);
  block_total(offsets, num_groups);
  const ampo::Points view = view_device(pointer, is_bfloat16, count, dim);
  py::gil_scoped_release release;
  ampo::pairwise_cuda(view, ampo::Metric(metric), offsets.data(), num_groups, device<float>(out_pointer), device<void>(stream));
}

void k_center_cuda(uintptr_t pointer, bool is_bfloat16, int64_t count, int64_t dim, int64_t k, const std::vector<int64_t>& seeds,
                   uintptr_t chosen_pointer, uintptr_t stream) {
  AMPO_CHECK(1 <= k && k <= count && int64_t(seeds.size()) <= k, "k must be in 1 .. n, with no more seeds than k");
  AMPO_CHECK(dim <= ampo::kMaxPoolDim, "a point has too many dimensions for shared memory");
  const ampo::Points view = view_device(pointer, is_bfloat16, count, dim);
  py::gil_scoped_release release;
  ampo::kcenter_cuda(view, k, seeds, device<int64_t>(chosen_pointer), device<void>(stream));
}

void select_cuda(uintptr_t pointer, bool is_bfloat16, int64_t count, int64_t dim, uintptr_t reward_pointer,
                 uintptr_t valid_pointer, uintptr_t positive_ok_pointer, const Array<int64_t>& offsets, uintptr_t keys_pointer,
                 int strategy, int64_t k, int64_t num_positives, bool cover_positives, double tie_tol, uint64_t seed,
                 const std::vector<uintptr_t>& out_pointers, uintptr_t stream) {
  const ampo::SelectInput input{view_device(pointer, is_bfloat16, count, dim),
                                device<const double>(reward_pointer),
                                device<const uint8_t>(valid_pointer),
                                device<const uint8_t>(positive_ok_pointer),
                                offsets.data(),
                                device<const int64_t>(keys_pointer),
                                checked_groups(offsets, count)};
  AMPO_CHECK(1 <= k && k <= ampo::kMaxCudaK && ampo::largest_group(input) <= ampo::kMaxCudaGroup, "too large for a block of threads a group");
  AMPO_CHECK(out_pointers.size() == 5, "five outputs");
  const ampo::SelectOptions options{ampo::Strategy(strategy), k, num_positives, cover_positives, tie_tol, seed, INFINITY};
  AMPO_CHECK(options.strategy != ampo::Strategy::kCoreset && options.strategy != ampo::Strategy::kOptSelectExact,
             "this strategy runs on the CPU only");
  const ampo::SelectOutput output{device<int64_t>(out_pointers[0]), device<int64_t>(out_pointers[1]),
                                  device<double>(out_pointers[2]), device<double>(out_pointers[3]),
                                  device<uint8_t>(out_pointers[4])};
  py::gil_scoped_release release;
  ampo::select_cuda(input, options, output, device<void>(stream));
}
#endif

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
  m.def("few_rows", &few_rows, py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("bias").noconvert() = py::none(),
        "x [rows, dim] times weight [outputs, dim] transposed, plus bias [outputs] -> [rows, outputs], float32.");
  m.attr("max_cuda_group") = ampo::kMaxCudaGroup;
  m.attr("max_cuda_k") = ampo::kMaxCudaK;
  m.attr("max_cuda_pool_dim") = ampo::kMaxPoolDim;
#ifdef AMPO_HAS_CUDA
  m.attr("has_cuda") = true;
  m.def("pairwise_cuda", &pairwise_cuda, py::arg("pointer"), py::arg("is_bfloat16"), py::arg("count"), py::arg("dim"),
        py::arg("offsets"), py::arg("metric"), py::arg("out_pointer"), py::arg("stream"));
  m.def("k_center_cuda", &k_center_cuda, py::arg("pointer"), py::arg("is_bfloat16"), py::arg("count"), py::arg("dim"),
        py::arg("k"), py::arg("seeds"), py::arg("chosen_pointer"), py::arg("stream"));
  m.def("select_cuda", &select_cuda, py::arg("pointer"), py::arg("is_bfloat16"), py::arg("count"), py::arg("dim"),
        py::arg("reward_pointer"), py::arg("valid_pointer"), py::arg("positive_ok_pointer"), py::arg("offsets"),
        py::arg("keys_pointer"), py::arg("strategy"), py::arg("k"), py::arg("num_positives"), py::arg("cover_positives"),
        py::arg("tie_tol"), py::arg("seed"), py::arg("out_pointers"), py::arg("stream"));
#else
  m.attr("has_cuda") = false;
#endif
}
