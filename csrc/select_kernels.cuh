// Two kernels. group_squared fills the squared distances of each group, a block of kThreads reading its points once.
// select_group does the rest with a thread a candidate: it waits more than it computes, and its blocks are small so that many
// groups share a processor.
//
// Sides and weights have the bits of select_group.cpp's. All costs are rounded as on the CPU (coverage.h), so sums are exact in
// any order and the same distances give the same choice.
//
// Compile with -fmad=false: a fused multiply-add would round costs differently from the CPU. fmaf is named where wanted.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_block.cuh"
#include "exact_scale.h"
#include "gram_kernels.cuh"
#include "random.h"
#include "select.h"
#include "stable_exp.h"

namespace ampo {

constexpr int kMaxChosen = int(kMaxCudaK);
constexpr int kNothing = -1;
constexpr int kDims = 32;  // of a point that lie in shared memory at a time

// --- distances ---------------------------------------------------------------------------------------------------------

template <typename Raw, int kSize>
struct SquaredShared {
  float point[kSize][kDims + 1];
};

template <int kSize>
struct SquaredShared<uint16_t, kSize> {
  float gram[kSize][kSize + 1];
  int num_near;
  int16_t pair[kSize * kSize / 2];
};

// squared[i][j] for all pairs: a thread holds kSize / 16 rows by as many columns. d(i, j) = d(j, i) bit for bit.
template <typename Raw, int kSize>
__device__ void fill_squared(const Raw* points, int count, int64_t dim, SquaredShared<Raw, kSize>& s, float* squared) {
  constexpr int kTile = kSize / 16;
  const int row0 = threadIdx.x / 16, col0 = threadIdx.x % 16;
  float sum[kTile][kTile] = {};
  for (int64_t begin = 0; begin < dim; begin += kDims) {
    for (int e = threadIdx.x; e < kSize * kDims; e += kThreads) {
      const int i = e / kDims, d = e % kDims;
      s.point[i][d] = i < count && begin + d < dim ? as_float(points[i * dim + begin + d]) : 0.0f;
    }
    __syncthreads();
    for (int d = 0; d < kDims; ++d) {
      float row[kTile], col[kTile];
      for (int t = 0; t < kTile; ++t) row[t] = s.point[row0 + 16 * t][d], col[t] = s.point[col0 + 16 * t][d];
      for (int r = 0; r < kTile; ++r) {
        for (int c = 0; c < kTile; ++c) sum[r][c] = fmaf(row[r] - col[c], row[r] - col[c], sum[r][c]);
      }
    }
    __syncthreads();
  }
  for (int r = 0; r < kTile; ++r) {
    for (int c = 0; c < kTile; ++c) squared[(row0 + 16 * r) * kSize + col0 + 16 * c] = sum[r][c];
  }
}

// The same by the tensor cores. A pair's own products decide whether it is near, so any order of the near ones gives the same
// bits.
template <int kSize>
__device__ void fill_squared(const uint16_t* points, int count, int64_t dim, SquaredShared<uint16_t, kSize>& s, float* squared) {
  const Rows16 rows(points, count, dim);
  if (threadIdx.x == 0) s.num_near = 0;
  fill_gram<kSize, true>(rows, rows, s.gram);
  for (int e = threadIdx.x; e < kSize * kSize; e += kThreads) {
    const int row = e / kSize, col = e % kSize, i = row < col ? row : col, j = row < col ? col : row;
    const float lengths = s.gram[i][i] + s.gram[j][j], apart = lengths - 2.0f * s.gram[i][j];
    squared[e] = i == j ? 0.0f : apart;
    if (row < col && j < count && !(apart > kClose * lengths)) s.pair[atomicAdd(&s.num_near, 1)] = int16_t(e);
  }
  __syncthreads();
  const auto as_it_is = [](float value) { return value; };
  for (int n = threadIdx.x / kWarp; n < s.num_near; n += kThreads / kWarp) {
    const int i = s.pair[n] / kSize, j = s.pair[n] % kSize;
    const float near = squared_by_warp(rows, i, j, as_it_is, as_it_is);
    if (threadIdx.x % kWarp == 0) squared[i * kSize + j] = squared[j * kSize + i] = near;
  }
}

// Blocks that share a processor's registers: as many as they hold without spills.
template <typename Raw, int kSize>
constexpr int kSharing = sizeof(Raw) == sizeof(float) ? 6 : kSize == 32 ? 4 : 3;

// [groups, kSize, kSize]; what lies beyond a group's candidates is never read.
template <typename Raw, int kSize>
__global__ void __launch_bounds__(kThreads, kSharing<Raw, kSize>) group_squared(SelectInput input, float* squared) {
  using Shared = SquaredShared<Raw, kSize>;
  AMPO_SHARED(Shared, s);
  const int64_t begin = input.offsets[blockIdx.x], dim = input.points.dim;
  const int count = int(input.offsets[blockIdx.x + 1] - begin);
  if (count < 2) return;  // nothing to choose
  const Raw* points = static_cast<const Raw*>(input.points.data) + begin * dim;
  fill_squared(points, count, dim, s, squared + int64_t(blockIdx.x) * kSize * kSize);
}

// --- one group ---------------------------------------------------------------------------------------------------------

template <int kSize>
struct GroupShared {
  const float* squared;           // [kSize, kSize] of the group, in global memory
  double cost[kSize][kSize + 1];  // [facility, client], rounded
  double first[kSize], second[kSize];  // of a client: the costs of its nearest and second nearest chosen facility
  int slot[kSize];                     // of that nearest one
  double value[kSize];                 // of a facility: its gain, or the change when it comes in
  int out[kSize];                      // of a facility: the slot it would replace
  double loss[kMaxChosen];
  double reduced[kSize / kWarp];
  int chosen[kMaxChosen], other[kMaxChosen];
  double reward[kSize];     // of a candidate
  uint64_t ticket[kSize];   // of a candidate: what Group::random_choice draws
  uint8_t is_valid[kSize], is_ok[kSize], is_positive[kSize], is_eligible[kSize], is_client[kSize];
  int16_t eligible[kSize], client[kSize];  // local indices, ascending
  double weight[kSize];                    // of a client
  double shift, scale, total, bound;
  int num_facilities, num_clients, k, pick;
};

// --- sides and weights: select_group.cpp, one thread a candidate -----------------------------------------------------------

// By rising value, ties by index. NaN, which the host would have refused, comes after every number: no two candidates have the
// same place, so every slot below k is filled.
__device__ inline bool is_before(double value_a, double value_b, int a, int b) {
  const bool is_nan_a = value_a != value_a, is_nan_b = value_b != value_b;
  if (is_nan_a != is_nan_b) return is_nan_b;
  return is_nan_a || value_a == value_b ? a < b : value_a < value_b;
}

template <int kSize>
__device__ bool falls(const GroupShared<kSize>& s, int a, int b) {
  return is_before(-s.reward[a], -s.reward[b], a, b);
}

template <int kSize>
__device__ bool rises(const GroupShared<kSize>& s, int a, int b) {
  return is_before(s.reward[a], s.reward[b], a, b);
}

// How many of the marked candidates come before t.
template <typename IsBefore>
__device__ int num_before(const uint8_t* is_marked, int count, int t, IsBefore is_before) {
  int num = 0;
  for (int u = 0; u < count; ++u) num += is_marked[u] && is_before(u, t);
  return num;
}

__device__ inline int num_marked(const uint8_t* is_marked, int count) {
  return num_before(is_marked, count, 0, [](int, int) { return true; });
}

// Who is positive, who may be chosen and who is covered; -> this thread's place among the positives, -1 where it is none.
template <int kSize>
__device__ int take_sides(const SelectInput& input, const SelectOptions& options, int64_t begin, int count,
                          GroupShared<kSize>& s) {
  const int t = threadIdx.x;
  const bool is_mine = t < count;
  if (is_mine) {
    s.reward[t] = input.reward[begin + t];
    s.is_valid[t] = input.valid[begin + t] != 0;
    s.is_ok[t] = s.is_valid[t] && input.positive_ok[begin + t];
  }
  __syncthreads();
  int place = -1;
  if (is_mine) {
    if (s.is_ok[t]) place = num_before(s.is_ok, count, t, [&s](int a, int b) { return falls(s, a, b); });
    if (place >= options.num_positives) place = -1;
    s.is_positive[t] = place >= 0;
  }
  __syncthreads();
  if (is_mine) {
    const bool has_rule = options.tie_tol == options.tie_tol;
    double last = INFINITY;
    for (int u = 0; u < count; ++u) last = s.is_positive[u] && s.reward[u] < last ? s.reward[u] : last;
    s.is_client[t] = s.is_valid[t] && (!s.is_positive[t] || options.cover_positives);
    s.is_eligible[t] = s.is_valid[t] && !s.is_positive[t] && (!has_rule || s.reward[t] < last - options.tie_tol);
  }
  __syncthreads();
  return place;
}

// Group::weigh; every thread adds the rewards up in the CPU's order.
template <int kSize>
__device__ void weigh(int count, GroupShared<kSize>& s) {
  const int t = threadIdx.x;
  double sum = 0.0, lowest = INFINITY;
  int num_valid = 0;
  for (int u = 0; u < count; ++u) {
    if (!s.is_valid[u]) continue;
    sum += s.reward[u];
    lowest = s.reward[u] < lowest ? s.reward[u] : lowest;
    ++num_valid;
  }
  if (t == 0) s.shift = stable_exp(sum / double(num_valid) - lowest);
  if (t < count && s.is_client[t]) {
    const int place = num_before(s.is_client, count, t, [](int a, int b) { return a < b; });
    s.client[place] = int16_t(t);
    s.weight[place] = stable_exp(lowest - s.reward[t]);
  }
}

// The choice of the strategies that need no distances, which is also where a search starts.
template <int kSize>
__device__ void choose_without_distances(const SelectInput& input, const SelectOptions& options, int count,
                                         GroupShared<kSize>& s) {
  const int t = threadIdx.x;
  const bool is_mine = t < count && s.is_eligible[t];
  const Random random(options.seed, uint64_t(input.keys[blockIdx.x]), kRandomStrategy);
  if (is_mine) s.ticket[t] = random.bits(uint64_t(t));
  __syncthreads();
  if (!is_mine) return;
  const int place = num_before(s.is_eligible, count, t, [](int a, int b) { return a < b; });
  s.eligible[place] = int16_t(t);
  int slot = place;  // where all are chosen
  if (s.k < s.num_facilities && options.strategy == Strategy::kRandom) {
    slot = num_before(s.is_eligible, count, t, [&s](int a, int b) {
      return s.ticket[a] != s.ticket[b] ? s.ticket[a] < s.ticket[b] : a < b;
    });
  } else if (s.k < s.num_facilities) {
    slot = num_before(s.is_eligible, count, t, [&s](int a, int b) { return rises(s, a, b); });
  }
  if (slot < s.k) s.chosen[slot] = s.other[slot] = place;
}

// False where there is no positive or no negative.
template <int kSize>
__device__ bool take_group(const SelectInput& input, const SelectOptions& options, const SelectOutput& output, int64_t begin,
                           int count, GroupShared<kSize>& s) {
  const int t = threadIdx.x;
  int64_t* positive = output.positive + int64_t(blockIdx.x) * options.num_positives;
  for (int64_t p = t; p < options.num_positives; p += kSize) positive[p] = -1;
  const int place = take_sides(input, options, begin, count, s);
  const int num_eligible = num_marked(s.is_eligible, count);
  if (num_eligible == 0 || num_marked(s.is_positive, count) == 0) return false;
  if (place >= 0) positive[place] = t;
  if (t == 0) {
    s.num_facilities = num_eligible, s.num_clients = num_marked(s.is_client, count);
    s.k = options.k < num_eligible ? int(options.k) : num_eligible;
    s.bound = s.k == num_eligible ? INFINITY : 0.0;  // the only choice there is
  }
  __syncthreads();
  weigh(count, s);
  choose_without_distances(input, options, count, s);
  __syncthreads();
  return true;
}

// --- costs -------------------------------------------------------------------------------------------------------------

template <int kSize>
__device__ float squared(const GroupShared<kSize>& s, int64_t i, int64_t j) {
  return s.squared[i * kSize + j];
}

template <int kSize>
__device__ double distance(const GroupShared<kSize>& s, int facility, int client) {
  return double(sqrtf(squared(s, s.eligible[facility], s.client[client])));
}

// Rounded, none dearer than `limit`.
template <int kSize>
__device__ void fill_costs(GroupShared<kSize>& s, double limit) {
  const int entries = s.num_facilities * s.num_clients;
  double largest = 0.0;
  for (int e = threadIdx.x; e < entries; e += kSize) {
    const int f = e / s.num_clients, c = e % s.num_clients;
    const double cost = s.weight[c] * distance(s, f, c);
    s.cost[f][c] = limit < cost ? limit : cost;
    largest = fmax(largest, s.cost[f][c]);
  }
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) s.reduced[threadIdx.x / kWarp] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kSize / kWarp; ++w) largest = fmax(largest, s.reduced[w]);
    s.scale = exact_scale(largest, double(s.num_clients) * double(s.k + 1));
  }
  __syncthreads();
  for (int e = threadIdx.x; e < entries; e += kSize) {
    double& cost = s.cost[e / s.num_clients][e % s.num_clients];
    cost = rint(cost * s.scale);
  }
  __syncthreads();
}

// --- local search: the steps of kmedoids_cpu.cpp, one thread a facility or a client --------------------------------------

template <int kSize>
__device__ bool is_in(const GroupShared<kSize>&, const int* chosen, int num, int facility) {
  for (int t = 0; t < num; ++t) {
    if (chosen[t] == facility) return true;
  }
  return false;
}

// pick = the facility with the largest value, ties to the lowest.
template <int kSize>
__device__ void pick_largest(GroupShared<kSize>& s) {
  __syncthreads();
  if (threadIdx.x == 0) {
    s.pick = 0;
    for (int j = 1; j < s.num_facilities; ++j) {
      if (s.value[j] > s.value[s.pick]) s.pick = j;
    }
  }
  __syncthreads();
}

template <int kSize>
__device__ void pick_cheapest_alone(GroupShared<kSize>& s) {
  const int j = threadIdx.x;
  if (j < s.num_facilities) {
    double cost = 0.0;
    for (int i = 0; i < s.num_clients; ++i) cost += s.cost[j][i];
    s.value[j] = -cost;
  }
  pick_largest(s);
}

template <int kSize>
__device__ void greedy_start(GroupShared<kSize>& s, int* chosen) {
  const int t = threadIdx.x;
  pick_cheapest_alone(s);
  for (int num = 0; num < s.k; ++num) {
    if (t == 0) chosen[num] = s.pick;
    if (t < s.num_clients) s.first[t] = num == 0 ? s.cost[s.pick][t] : fmin(s.first[t], s.cost[s.pick][t]);
    __syncthreads();
    if (num + 1 == s.k) break;
    if (t < s.num_facilities) {
      double gain = 0.0;
      for (int i = 0; i < s.num_clients; ++i) gain += fmax(0.0, s.first[i] - s.cost[t][i]);
      s.value[t] = is_in(s, chosen, num + 1, t) ? -1.0 : gain;
    }
    pick_largest(s);
  }
}

template <int kSize>
__device__ void fill_nearest(GroupShared<kSize>& s, const int* chosen) {
  const int i = threadIdx.x;
  if (i < s.num_clients) {
    double first = INFINITY, second = INFINITY;
    int slot = 0;
    for (int t = 0; t < s.k; ++t) {
      const double cost = s.cost[chosen[t]][i];
      const bool closer = cost < first;
      second = closer ? first : fmin(second, cost);
      slot = closer ? t : slot;
      first = closer ? cost : first;
    }
    s.first[i] = first, s.second[i] = second, s.slot[i] = slot;
  }
  __syncthreads();
  if (i < s.k) {
    double loss = 0.0;
    for (int c = 0; c < s.num_clients; ++c) {
      if (s.slot[c] == i) loss += s.second[c] - s.first[c];
    }
    s.loss[i] = loss;
  }
  __syncthreads();
}

// value, out: the best swap that brings this thread's facility in.
template <int kSize>
__device__ void fill_swaps(GroupShared<kSize>& s, const int* chosen) {
  const int in = threadIdx.x;
  if (in < s.num_facilities) {
    double change[kMaxChosen], shared_gain = 0.0;
    for (int t = 0; t < s.k; ++t) change[t] = s.loss[t];
    for (int i = 0; i < s.num_clients; ++i) {
      const double cost = s.cost[in][i], first = s.first[i], second = s.second[i];
      shared_gain += fmin(cost - first, 0.0);
      change[s.slot[i]] += fmax(first, fmin(cost, second)) - second;
    }
    int best = 0;
    for (int t = 1; t < s.k; ++t) {
      if (change[t] < change[best] || (change[t] == change[best] && chosen[t] < chosen[best])) best = t;
    }
    s.value[in] = is_in(s, chosen, s.k, in) ? 0.0 : change[best] + shared_gain;
    s.out[in] = best;
  }
  __syncthreads();
}

// Swaps until none lowers the cost. The CPU tries candidates in turn and swaps at once; here all are tried at the same time
// and the first in turn that gains is taken, which is the same sequence. Leaves the cost in total.
template <int kSize>
__device__ void swap_search(GroupShared<kSize>& s, int* chosen) {
  if (s.k == 1) {
    pick_cheapest_alone(s);
    if (threadIdx.x == 0) chosen[0] = s.pick;
    __syncthreads();
  }
  int next = 0;
  while (true) {
    fill_nearest(s, chosen);
    if (s.k == 1) break;
    fill_swaps(s, chosen);
    if (threadIdx.x == 0) {
      s.pick = kNothing;
      for (int step = 0; step < s.num_facilities && s.pick == kNothing; ++step) {
        const int in = (next + step) % s.num_facilities;
        if (s.value[in] < 0.0) s.pick = in;
      }
      if (s.pick != kNothing) chosen[s.out[s.pick]] = s.pick;
    }
    __syncthreads();
    const int taken = s.pick;
    __syncthreads();
    if (taken == kNothing) break;
    next = (taken + 1) % s.num_facilities;
  }
  if (threadIdx.x == 0) {
    s.total = 0.0;
    for (int i = 0; i < s.num_clients; ++i) s.total += s.first[i];
  }
  __syncthreads();
}

// What the chosen cost before rounding is nothing. Every thread looks at every client: rare, and uniform for free.
template <int kSize>
__device__ bool is_free(const GroupShared<kSize>& s) {
  for (int i = 0; i < s.num_clients; ++i) {
    float nearest = INFINITY;
    for (int t = 0; t < s.k; ++t) nearest = fminf(nearest, squared(s, s.eligible[s.chosen[t]], s.client[i]));
    if (s.weight[i] * double(sqrtf(nearest)) > 0.0) return false;
  }
  return true;
}

// Coverage::sharpen.
template <int kSize>
__device__ bool sharpen(GroupShared<kSize>& s) {
  const double total = s.total, limit = cost_limit(total, s.num_clients, s.scale);
  const bool is_finer = exact_scale(limit, double(s.num_clients) * double(s.k + 1)) > s.scale;
  const bool goes_on = is_coarse(total, s.num_clients) && is_finer;
  const bool is_done = goes_on && total == 0.0 && is_free(s);
  __syncthreads();
  if (goes_on) fill_costs(s, limit);
  return goes_on && !is_done;
}

// From the greedy start and from the given one (the lowest rewards); the greedy one's end where both cost the same.
template <int kSize>
__device__ void opt_select(GroupShared<kSize>& s) {
  fill_costs(s, INFINITY);
  swap_search(s, s.other);
  const double from_given = s.total;
  __syncthreads();
  greedy_start(s, s.chosen);
  swap_search(s, s.chosen);
  const bool is_given_better = from_given < s.total;
  __syncthreads();
  if (is_given_better && int(threadIdx.x) < s.k) s.chosen[threadIdx.x] = s.other[threadIdx.x];
  if (is_given_better && threadIdx.x == 0) s.total = from_given;
  __syncthreads();
  while (sharpen(s)) swap_search(s, s.chosen);
  if (threadIdx.x == 0) {
    const double steps = double(s.num_clients) * double(s.k + 1);
    // a swap's local optimum is within 5 x the optimum
    s.bound = sure_bound(s.total, steps, is_coarse(s.total, s.num_clients)) / s.scale / 5.0;
  }
  __syncthreads();
}

template <int kSize>
__device__ void k_center(GroupShared<kSize>& s, const int64_t* positive, int64_t num_positives) {
  const int j = threadIdx.x;
  const bool is_mine = j < s.num_facilities;
  float nearest = INFINITY;
  for (int64_t p = 0; is_mine && p < num_positives && positive[p] >= 0; ++p) {
    nearest = fminf(nearest, squared(s, s.eligible[j], positive[p]));
  }
  for (int num = 0; num < s.k; ++num) {
    if (is_mine) s.value[j] = is_in(s, s.chosen, num, j) ? -1.0 : double(nearest);
    pick_largest(s);
    if (j == 0) s.chosen[num] = s.pick;
    if (is_mine) nearest = fminf(nearest, squared(s, s.eligible[j], s.eligible[s.pick]));
    __syncthreads();
  }
}

// --- a whole group -----------------------------------------------------------------------------------------------------

template <int kSize>
__device__ void write_group(const SelectOptions& options, const SelectOutput& output, GroupShared<kSize>& s) {
  const int t = threadIdx.x;
  if (t < s.num_clients) {
    float nearest = INFINITY;
    for (int c = 0; c < s.k; ++c) nearest = fminf(nearest, squared(s, s.eligible[s.chosen[c]], s.client[t]));
    s.value[t] = double(sqrtf(nearest));
    s.first[t] = s.weight[t] * s.value[t];
  }
  __syncthreads();
  if (t < s.k) {  // ascending: a facility's place is how many chosen ones are lower
    int place = 0;
    for (int c = 0; c < s.k; ++c) place += s.chosen[c] < s.chosen[t];
    output.negative[blockIdx.x * options.k + place] = s.eligible[s.chosen[t]];
  }
  if (t != 0) return;
  double cost = 0.0;
  bool has_lost = false;
  for (int c = 0; c < s.num_clients; ++c) {
    cost += s.first[c];  // in order, as on the CPU
    has_lost |= s.weight[c] == 0.0 && s.value[c] > 0.0;
  }
  cost = cost == 0.0 ? 0.0 : cost * s.shift;  // the shift may have overflowed
  const double bound = s.bound == INFINITY || s.bound == 0.0 ? s.bound : s.bound * s.shift;
  output.cost[blockIdx.x] = cost;
  output.lower_bound[blockIdx.x] = fmin(bound, cost);
  output.proven[blockIdx.x] = bound >= cost && (s.bound == INFINITY || !has_lost);
}

// A block of kSize threads a group, its squared distances from group_squared.
template <int kSize>
__global__ void select_group(SelectInput input, SelectOptions options, const float* squared, SelectOutput output) {
  AMPO_SHARED(GroupShared<kSize>, s);
  const int64_t begin = input.offsets[blockIdx.x];
  const int count = int(input.offsets[blockIdx.x + 1] - begin);
  if (threadIdx.x == 0) s.squared = squared + int64_t(blockIdx.x) * kSize * kSize;
  const bool is_taken = take_group(input, options, output, begin, count, s);
  const int64_t k = is_taken ? s.k : 0;
  for (int64_t t = k + threadIdx.x; t < options.k; t += kSize) output.negative[blockIdx.x * options.k + t] = -1;
  if (!is_taken) {
    if (threadIdx.x == 0) {
      output.cost[blockIdx.x] = output.lower_bound[blockIdx.x] = NAN;
      output.proven[blockIdx.x] = 0;
    }
    return;
  }
  if (k < s.num_facilities && options.strategy == Strategy::kKCenter) {
    k_center(s, output.positive + blockIdx.x * options.num_positives, options.num_positives);
  }
  if (k < s.num_facilities && options.strategy == Strategy::kOptSelect) opt_select(s);
  write_group(options, output, s);
}

// What a launch takes that begins with group `first`.
inline SelectInput groups_from(SelectInput input, int64_t first) {
  input.offsets += first, input.keys += first, input.num_groups -= first;
  return input;
}

inline SelectOutput groups_from(SelectOutput output, const SelectOptions& options, int64_t first) {
  output.positive += first * options.num_positives, output.negative += first * options.k;
  output.cost += first, output.lower_bound += first, output.proven += first;
  return output;
}

}  // namespace ampo
