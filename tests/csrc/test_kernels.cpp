// The CUDA kernels' text on a CPU against the CPU path: on a grid every distance is exact, so every answer must be the same.
#include "cuda_on_cpu.h"
// The shim comes first: it stands for the CUDA compiler's words.
#include "kcenter_kernels.cuh"
#include "pairwise_kernels.cuh"
#include "select_kernels.cuh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "kcenter.h"
#include "random.h"

namespace {

int num_checks = 0;

void expect(bool condition, const char* what, int64_t where) {
  ++num_checks;
  if (condition) return;
  std::fprintf(stderr, "failed: %s at %lld\n", what, static_cast<long long>(where));
  std::exit(1);
}

struct Cloud {
  std::vector<float> single;
  std::vector<uint16_t> half;
  int64_t count, dim;

  Cloud(int64_t count, int64_t dim, uint64_t seed) : count(count), dim(dim) {
    const ampo::Random random(seed, 0, ampo::kRandomStrategy);
    for (int64_t e = 0; e < count * dim; ++e) {
      single.push_back(float(int64_t(random.bits(uint64_t(e)) % 5) - 2));
    }
    half.resize(single.size());
    shift(0.0f);
  }
  // The grid far from the origin: all pairs are near, and their distances still exact.
  Cloud& shift(float by) {
    for (size_t e = 0; e < single.size(); ++e) {
      single[e] += by;
      uint32_t bits;
      std::memcpy(&bits, &single[e], sizeof(bits));
      half[e] = uint16_t(bits >> 16);
    }
    return *this;
  }
  ampo::Points view() const { return {single.data(), ampo::Dtype::kFloat32, count, dim}; }
};

template <typename Raw>
void test_pool(const Raw* points, const Cloud& cloud, int64_t k, const std::vector<int64_t>& seeds, int num_blocks) {
  std::vector<int64_t> expected(k), chosen(k, -1);
  ampo::kcenter_cpu(cloud.view(), k, seeds, expected.data());
  const std::vector<int64_t> first = seeds.empty() ? std::vector<int64_t>{0} : seeds;
  std::copy(first.begin(), first.end(), chosen.begin());
  std::vector<float> nearest(cloud.count);
  std::vector<ampo::Farthest> partial(2 * num_blocks);
  const ampo::PoolArgs args{points,         cloud.count,           cloud.dim, nearest.data(), chosen.data(),
                            partial.data(), int64_t(first.size()), num_blocks};
  for (int64_t step = 0; step < k; ++step) {
    const bool is_last = step == k - 1;
    cuda_on_cpu::launch(is_last ? 1 : num_blocks, ampo::kThreads, [&] { ampo::pool_step<Raw, 4>(args, step, is_last); });
  }
  for (int64_t c = 0; c < k; ++c) expect(chosen[c] == expected[c], "k-center of a pool", c);
}

// (by the kernel, by the CPU)
template <typename Raw>
std::pair<std::vector<float>, std::vector<float>> pairwise(const Raw* points, const Cloud& cloud, ampo::Metric metric) {
  const std::vector<int64_t> offsets{0, cloud.count};
  std::vector<float> expected(cloud.count * cloud.count), out(cloud.count * cloud.count, -1.0f);
  ampo::pairwise_cpu(cloud.view(), metric, offsets.data(), 1, expected.data());
  std::vector<ampo::Tile> tiles;
  const int32_t side = int32_t((cloud.count + ampo::kSide - 1) / ampo::kSide);
  for (int32_t t = 0; t < side * side; ++t) tiles.push_back({0, cloud.count, 0, t / side, t % side});
  std::vector<double> length(cloud.count);
  const unsigned warps = ampo::kThreads / ampo::kWarp;
  cuda_on_cpu::launch(unsigned(cloud.count + warps - 1) / warps, ampo::kThreads,
                      [&] { ampo::point_lengths<Raw>(points, cloud.count, cloud.dim, length.data()); });
  const ampo::PairwiseArgs args{points, cloud.dim, tiles.data(), length.data(), metric, out.data()};
  cuda_on_cpu::launch(unsigned(tiles.size()), ampo::kThreads, [&] { ampo::pairwise_tile<Raw>(args); });
  return {out, expected};
}

template <typename Raw>
void test_pairwise(const Raw* points, const Cloud& cloud, ampo::Metric metric) {
  const auto [out, expected] = pairwise(points, cloud, metric);
  for (int64_t e = 0; e < cloud.count * cloud.count; ++e) {
    // The grid's squares are exact; unit rows are rounded, so cosine has a tolerance.
    const float slack = metric == ampo::Metric::kCosine ? 1e-6f : 0.0f;
    expect(std::abs(out[e] - expected[e]) <= slack, "pairwise", e);
  }
}

// Points that differ in a bit or two: |a|^2 + |b|^2 - 2 ab has no digit of their distances.
void test_near(int64_t dim) {
  Cloud cloud(6, dim, 4);
  for (int64_t e = 0; e < 6 * dim; ++e) {
    const uint16_t common = uint16_t(0x3f00 + 37 * (e % dim) % 256);  // 0.5 to 2
    cloud.half[e] = uint16_t(common + (e % 53 == 0) + (e / dim == 5 ? 64 : 0));
    cloud.single[e] = ampo::as_float(cloud.half[e]);
  }
  for (const ampo::Metric metric : {ampo::Metric::kSquared, ampo::Metric::kEuclidean, ampo::Metric::kCosine}) {
    const auto [out, expected] = pairwise(cloud.half.data(), cloud, metric);
    for (int64_t e = 0; e < 36; ++e) {
      // The last point is apart from the others: its distances are differences of products, whose long sums round more.
      const bool is_apart = e / 6 == 5 || e % 6 == 5;
      const float slack = is_apart && dim > 1000 ? 1e-4f : 1e-5f;
      expect(std::abs(out[e] - expected[e]) <= slack * expected[e] + (metric == ampo::Metric::kCosine ? 1e-9f : 0.0f), "near points", e);
    }
  }
}

// As select_cuda launches it, 4 groups at a time.
template <typename Raw, int kSize>
void select_on_device(const ampo::SelectInput& input, const ampo::SelectOptions& options, const ampo::SelectOutput& output) {
  std::vector<float> squared(4 * kSize * kSize, std::nanf(""));
  for (int64_t first = 0; first < input.num_groups; first += 4) {
    const ampo::SelectInput part = ampo::groups_from(input, first);
    const ampo::SelectOutput out = ampo::groups_from(output, options, first);
    const unsigned num_groups = unsigned(std::min<int64_t>(4, part.num_groups));
    cuda_on_cpu::scribble();
    cuda_on_cpu::launch(num_groups, ampo::kThreads, [&] { ampo::group_squared<Raw, kSize>(part, squared.data()); });
    cuda_on_cpu::scribble();
    cuda_on_cpu::launch(num_groups, kSize, [&] { ampo::select_group<kSize>(part, options, squared.data(), out); });
  }
}

template <typename Raw, int kSize>
void test_select(const Raw* raw, const Cloud& cloud, const std::vector<int64_t>& offsets, ampo::Strategy strategy, int64_t k,
                 int64_t num_positives, uint64_t seed) {
  const int64_t num_groups = int64_t(offsets.size()) - 1;
  const ampo::Random random(seed, 1, ampo::kRandomStrategy);
  std::vector<double> reward;
  std::vector<uint8_t> valid, positive_ok;
  std::vector<int64_t> keys(num_groups);
  std::iota(keys.begin(), keys.end(), 5);
  for (uint64_t i = 0; i < uint64_t(cloud.count); ++i) {
    // A third of the seeds has weights from 1 down to e^-160: the costs are cut off and rounded again.
    reward.push_back(double(random.bits(3 * i) % 5) / 4 * (seed == 2 ? 160 : 1));
    valid.push_back(random.bits(3 * i + 1) % 10 != 0);
    positive_ok.push_back(random.bits(3 * i + 2) % 4 != 0);
  }
  const ampo::SelectInput input{cloud.view(), reward.data(), valid.data(), positive_ok.data(), offsets.data(), keys.data(), num_groups};
  const ampo::SelectOptions options{strategy, k, num_positives, seed % 2 == 0, seed % 3 ? std::nan("") : 0.0, seed, INFINITY};
  std::vector<int64_t> positive[2], negative[2];
  std::vector<double> cost[2], bound[2];
  std::vector<uint8_t> proven[2];
  for (int path = 0; path < 2; ++path) {
    positive[path].assign(num_groups * num_positives, -9), negative[path].assign(num_groups * k, -9);
    cost[path].assign(num_groups, -9), bound[path].assign(num_groups, -9), proven[path].assign(num_groups, 9);
  }
  ampo::select_cpu(input, options, {positive[0].data(), negative[0].data(), cost[0].data(), bound[0].data(), proven[0].data()});
  const ampo::SelectOutput on_device{positive[1].data(), negative[1].data(), cost[1].data(), bound[1].data(), proven[1].data()};
  ampo::SelectInput given = input;
  given.points.data = raw;
  select_on_device<Raw, kSize>(given, options, on_device);
  expect(positive[1] == positive[0], "positives", int64_t(strategy));
  expect(negative[1] == negative[0], "negatives", int64_t(strategy));
  expect(proven[1] == proven[0], "proven", int64_t(strategy));
  for (int64_t g = 0; g < num_groups; ++g) {
    expect(std::isnan(cost[0][g]) ? std::isnan(cost[1][g]) : cost[0][g] == cost[1][g], "cost", g);
    expect(std::isnan(bound[0][g]) ? std::isnan(bound[1][g]) : bound[0][g] == bound[1][g], "lower bound", g);
  }
}

// One entry much dearer than all others, wherever a thread finds it, sets the scale.
template <int kSize>
void test_scale_is_of_the_dearest(int dearest) {
  const std::vector<float> squared(kSize * kSize, 1.0f);
  auto& s = *reinterpret_cast<ampo::GroupShared<kSize>*>(cuda_on_cpu::shared);
  cuda_on_cpu::scribble();
  s.squared = squared.data();
  s.num_facilities = s.k = 1, s.num_clients = kSize, s.eligible[0] = 0;
  for (int c = 0; c < kSize; ++c) s.client[c] = int16_t(c), s.weight[c] = c == dearest ? 1024.0 : 1.0;
  cuda_on_cpu::launch(1, kSize, [&] { ampo::fill_costs(s, INFINITY); });
  expect(s.scale == ampo::exact_scale(1024.0, 2.0 * kSize), "scale of the costs", dearest);
}

// A GPU is not waited for, so NaN is not refused there: what is chosen must still be candidates, each of them once.
void test_nan_rewards(ampo::Strategy strategy) {
  const double nan = std::nan("");
  const Cloud cloud(6, 5, 7);
  const std::vector<double> reward{nan, 2, nan, nan, 0.5, nan};
  const std::vector<uint8_t> valid{1, 1, 1, 1, 1, 0}, anyone(6, 1), first_two{1, 1, 0, 0, 0, 0};
  const std::vector<int64_t> offsets{0, 6}, keys{1};
  for (const auto& positive_ok : {anyone, first_two}) {
    const ampo::SelectInput input{cloud.view(), reward.data(), valid.data(), positive_ok.data(), offsets.data(), keys.data(), 1};
    std::vector<int64_t> positive(2, -9), negative(2, -9);
    double cost = 0, bound = 0;
    uint8_t proven = 9;
    select_on_device<float, 32>(input, {strategy, 2, 2, false, nan, 0, INFINITY},
                                {positive.data(), negative.data(), &cost, &bound, &proven});
    const std::vector<int64_t> expected{1, positive_ok == anyone ? 4 : 0};
    expect(positive == expected, "positives beside NaN", int64_t(strategy));
    std::vector<uint8_t> may = valid;
    for (const int64_t i : positive) may[i] = 0;
    for (const int64_t i : negative) expect(0 <= i && i < 6 && may[i]-- == 1, "negatives beside NaN", int64_t(strategy));
    const std::vector<int64_t> lowest = positive_ok == anyone ? std::vector<int64_t>{0, 2} : std::vector<int64_t>{2, 4};
    expect(strategy != ampo::Strategy::kBottomK || negative == lowest, "the lowest beside NaN", int64_t(strategy));
    expect(std::isnan(cost), "cost beside NaN", int64_t(strategy));
  }
}

}  // namespace

int main() {
  const Cloud pool(150, 8, 1);
  for (const int num_blocks : {1, 3}) {
    test_pool(pool.single.data(), pool, 20, {}, num_blocks);
    test_pool(pool.half.data(), pool, 6, {149, 3}, num_blocks);
  }
  test_pool(pool.single.data(), pool, 2, {5, 6}, 2);
  test_pool(pool.single.data(), pool, 1, {}, 2);
  const Cloud small(70, 35, 2), aligned(37, 72, 3);
  for (const ampo::Metric metric : {ampo::Metric::kSquared, ampo::Metric::kEuclidean, ampo::Metric::kCosine}) {
    test_pairwise(small.single.data(), small, metric);
    test_pairwise(small.half.data(), small, metric);
    test_pairwise(aligned.half.data(), aligned, metric);
  }
  for (const int64_t dim : {45, 48, 1160}) test_near(dim);
  const std::vector<int64_t> sizes{0, 1, 2, 5, 32, 17}, large{64, 33};
  for (uint64_t seed = 0; seed < 3; ++seed) {
    for (const ampo::Strategy strategy : {ampo::Strategy::kBottomK, ampo::Strategy::kKCenter, ampo::Strategy::kOptSelect,
                                          ampo::Strategy::kRandom}) {
      std::vector<int64_t> offsets{0}, wide{0};
      for (const int64_t size : sizes) offsets.push_back(offsets.back() + size);
      for (const int64_t size : large) wide.push_back(wide.back() + size);
      const Cloud few(offsets.back(), seed == 1 ? 1 : 33, seed), many(wide.back(), 5, seed);
      test_select<float, 32>(few.single.data(), few, offsets, strategy, 1 + 3 * int64_t(seed), 1 + int64_t(seed) % 2, seed);
      test_select<uint16_t, 32>(few.half.data(), few, offsets, strategy, 3, 1, seed);
      test_select<float, 64>(many.single.data(), many, wide, strategy, 8, 2, seed);
      if (strategy != ampo::Strategy::kOptSelect) continue;
      const Cloud vectors(wide.back(), 104, seed);
      test_select<uint16_t, 64>(vectors.half.data(), vectors, wide, strategy, 8, 2, seed);
      // Far enough that products' sums are beyond 2^24: without the differences the distances would not be exact.
      const Cloud near = Cloud(wide.back(), 520 + 6 * int64_t(seed), seed).shift(250.0f);
      test_select<uint16_t, 64>(near.half.data(), near, wide, strategy, 8, 2, seed);
    }
  }
  for (const int dearest : {0, 1, 30, 31}) test_scale_is_of_the_dearest<32>(dearest);
  for (const int dearest : {0, 31, 32, 63}) test_scale_is_of_the_dearest<64>(dearest);
  for (const ampo::Strategy strategy : {ampo::Strategy::kBottomK, ampo::Strategy::kKCenter, ampo::Strategy::kOptSelect,
                                        ampo::Strategy::kRandom}) {
    test_nan_rewards(strategy);
  }
  std::printf("kernels on the CPU: %d checks passed\n", num_checks);
  return 0;
}
