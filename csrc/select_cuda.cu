#include <algorithm>

#include "cuda_call.h"
#include "select.h"
#include "select_kernels.cuh"

namespace ampo {
namespace {

// Of the distances between the two kernels: little enough to stay in a large GPU's cache.
constexpr int64_t kScratchBytes = int64_t(32) << 20;

template <typename Raw, int kSize>
void launch(const SelectInput& input, const SelectOptions& options, const SelectOutput& output, cudaStream_t stream) {
  constexpr size_t kSquaredBytes = sizeof(SquaredShared<Raw, kSize>), kGroupBytes = sizeof(GroupShared<kSize>);
  static_assert(kSquaredBytes <= 48 * 1024 && kGroupBytes <= 48 * 1024, "more shared memory has to be asked for");
  constexpr int64_t kEntries = int64_t(kSize) * kSize, kGroups = kScratchBytes / int64_t(sizeof(float)) / kEntries;
  const DeviceBuffer<float> squared(std::min(kGroups, input.num_groups) * kEntries, stream);
  for (int64_t first = 0; first < input.num_groups; first += kGroups) {
    const SelectInput part = groups_from(input, first);
    const dim3 blocks(unsigned(std::min(kGroups, part.num_groups)));
    group_squared<Raw, kSize><<<blocks, kThreads, kSquaredBytes, stream>>>(part, squared.data());
    select_group<kSize><<<blocks, kSize, kGroupBytes, stream>>>(part, options, squared.data(), groups_from(output, options, first));
  }
  cuda_check(cudaGetLastError(), "selector");
}

template <typename Raw>
void launch_for(int64_t largest, const SelectInput& input, const SelectOptions& options, const SelectOutput& output,
                cudaStream_t stream) {
  largest <= 32 ? launch<Raw, 32>(input, options, output, stream) : launch<Raw, 64>(input, options, output, stream);
}

}  // namespace

void select_cuda(SelectInput input, const SelectOptions& options, const SelectOutput& output, void* stream_pointer) {
  if (input.num_groups == 0) return;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const int64_t largest = largest_group(input);
  const DeviceBuffer<int64_t> offsets(input.offsets, input.num_groups + 1, stream);
  input.offsets = offsets.data();
  if (input.points.dtype == Dtype::kBfloat16) {
    require_bfloat16_cores();
    launch_for<uint16_t>(largest, input, options, output, stream);
  } else {
    launch_for<float>(largest, input, options, output, stream);
  }
}

}  // namespace ampo
