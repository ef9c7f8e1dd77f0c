#include <algorithm>

#include "cuda_call.h"
#include "select.h"
#include "select_kernels.cuh"

namespace ampo {
namespace {

template <typename Raw, int kSize>
void launch(const SelectInput& input, const SelectOptions& options, const SelectOutput& output, cudaStream_t stream) {
  const int bytes = int(sizeof(GroupShared<kSize>));
  cuda_check(cudaFuncSetAttribute(select_group<Raw, kSize>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "shared memory of the selector");
  select_group<Raw, kSize><<<dim3(unsigned(input.num_groups)), kThreads, bytes, stream>>>(input, options, output);
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
