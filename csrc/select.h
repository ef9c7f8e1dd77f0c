// The selector: 1 or more positives and k negatives of every group, from embeddings and rewards, over many ragged groups.
#pragma once

#include <cstdint>
#include <functional>

#include "points.h"

namespace ampo {

enum class Strategy { kBottomK, kCoreset, kKCenter, kOptSelect, kOptSelectExact, kBestWorst, kRandom };

struct SelectInput {
  Points points;               // [n, E], the groups one after the other
  const double* reward;        // [n]
  const uint8_t* valid;        // [n] 0: never selected, counted nowhere; its reward and embedding may be anything
  const uint8_t* positive_ok;  // [n] 0: can only be a negative
  const int64_t* offsets;      // [num_groups + 1]
  const int64_t* keys;         // [num_groups] seed kCoreset and kRandom
  int64_t num_groups;
};

struct SelectOptions {
  Strategy strategy;
  int64_t k;
  int64_t num_positives;
  bool cover_positives;  // they are covered points too, beside the other valid candidates
  double tie_tol;        // a candidate with reward >= that of the last positive - tie_tol is no negative; NaN: no such rule
  uint64_t seed;
  double time_limit_s;  // kOptSelectExact: for the whole call, shared out fairly; infinity: none
};

// Indices are local to the group and int64; -1 fills. cost, lower_bound: NaN for a group without positive or negative.
struct SelectOutput {
  int64_t* positive;    // [num_groups, num_positives] by falling reward, ties by index
  int64_t* negative;    // [num_groups, k] ascending
  double* cost;         // [num_groups] sum_i exp(mean reward - reward_i) min_{j chosen} ||e_i - e_j||
  double* lower_bound;  // [num_groups]
  uint8_t* proven;      // [num_groups]
};

// is_unwanted, where given: asked now and then in the calling thread; once it says yes, what is left is left out.
void select_cpu(const SelectInput& input, const SelectOptions& options, const SelectOutput& output,
                const std::function<bool()>& is_unwanted = {});

// Size of the largest group; offsets on the host.
inline int64_t largest_group(const SelectInput& input) {
  int64_t largest = 0;
  for (int64_t g = 0; g < input.num_groups; ++g) {
    const int64_t count = input.offsets[g + 1] - input.offsets[g];
    largest = count > largest ? count : largest;
  }
  return largest;
}

// The same on a device for groups of at most kMaxCudaGroup, k <= kMaxCudaK, float32 or bfloat16 points, and every strategy but
// kCoreset and kOptSelectExact: all pointers are device pointers but input.offsets, `stream` is a cudaStream_t. Does not wait.
constexpr int64_t kMaxCudaGroup = 64;
constexpr int64_t kMaxCudaK = 32;
void select_cuda(SelectInput input, const SelectOptions& options, const SelectOutput& output, void* stream);

}  // namespace ampo
