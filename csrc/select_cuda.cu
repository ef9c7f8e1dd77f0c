#include <algorithm>

#include "cuda_call.h"
#include "select.h"
#include "select_kernels.cuh"
#include "select_plan.h"

namespace ampo {
namespace {

template <typename Raw, int kSize>
void launch(const GroupArgs& args, int64_t num_groups, cudaStream_t stream) {
  const int bytes = int(sizeof(GroupShared<kSize>));
  cuda_check(cudaFuncSetAttribute(select_group<Raw, kSize>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "shared memory of the selector");
  select_group<Raw, kSize><<<dim3(unsigned(num_groups)), kThreads, bytes, stream>>>(args);
  cuda_check(cudaGetLastError(), "selector");
}

template <typename Raw>
void launch_for(int64_t largest, const GroupArgs& args, int64_t num_groups, cudaStream_t stream) {
  largest <= 32 ? launch<Raw, 32>(args, num_groups, stream) : launch<Raw, 64>(args, num_groups, stream);
}

}  // namespace

void select_cuda(const SelectInput& input, const SelectOptions& options, const SelectOutput& output, void* stream_pointer) {
  if (input.num_groups == 0) return;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const SelectPlan plan(input, options);
  const DeviceBuffer<GroupPlan> groups(plan.group, stream);
  const DeviceBuffer<int16_t> eligible(plan.eligible, stream), client(plan.client, stream), given(plan.given, stream);
  const DeviceBuffer<double> weight(plan.weight, stream);
  cuda_check(cudaMemcpyAsync(output.positive, plan.positive.data(), sizeof(int64_t) * plan.positive.size(),
                             cudaMemcpyHostToDevice, stream), "positives");
  const GroupArgs args{input.points.data, input.points.dim, options.k,       options.num_positives, groups.data(),
                       eligible.data(),   client.data(),    weight.data(),   given.data(),          output.positive,
                       plan.strategy,     output.negative,  output.cost,     output.lower_bound,    output.proven};
  if (input.points.dtype == Dtype::kBfloat16) {
    require_bfloat16_cores();
    launch_for<uint16_t>(plan.largest, args, input.num_groups, stream);
  } else {
    launch_for<float>(plan.largest, args, input.num_groups, stream);
  }
}

}  // namespace ampo
