// The states of packed sequences on CUDA: a copy of elements of 2 or 4 bytes, whatever they mean.
#include "causal_conv1d/plan.h"
#include "core/cuda/any_dtype.cuh"
#include "core/cuda/launch.h"
#include "core/error.h"
#include "core/math.h"

namespace mamba_native::causal_conv1d::cuda {

inline constexpr int kThreads = 64;

template <class Bits>
struct DeviceVarlenStates {
  std::int64_t tokens, sequences, channels, state_len;
  const Bits* x;
  std::int64_t x_token, x_channel;
  const void* cu_seqlens;
  DType cu_seqlens_dtype;
  std::int64_t cu_seqlens_step;
  Bits* states;
  std::int64_t states_sequence, states_channel, states_column;

  __device__ __forceinline__ std::int64_t boundary(std::int64_t s) const {
    const std::int64_t at =
        mamba_native::cuda::read_index(cu_seqlens, cu_seqlens_dtype, s * cu_seqlens_step);
    return max(std::int64_t{0}, min(at, tokens));  // stays inside x, whatever was passed
  }
};

// states[s, :, state_len - 1 - j] = x[end of sequence s - 1 - j] while that belongs to s, else 0.
// grid = (blocks of channels, columns of all sequences).
template <class Bits>
__global__ void __launch_bounds__(kThreads) varlen_states_kernel(const DeviceVarlenStates<Bits> p) {
  const std::int64_t d = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (d >= p.channels) {
    return;
  }
  const std::int64_t columns = p.sequences * p.state_len;
  for (std::int64_t i = blockIdx.y; i < columns; i += gridDim.y) {
    const std::int64_t s = i / p.state_len;
    const std::int64_t column = i % p.state_len;
    const std::int64_t token = p.boundary(s + 1) - p.state_len + column;
    Bits value = 0;  // +0 in every dtype
    if (token >= p.boundary(s)) {
      value = p.x[token * p.x_token + d * p.x_channel];
    }
    p.states[s * p.states_sequence + d * p.states_channel + column * p.states_column] = value;
  }
}

template <class Bits>
void launch(const VarlenStatesParams& params) {
  DeviceVarlenStates<Bits> p;
  p.tokens = params.x.size[0];
  p.channels = params.x.size[1];
  p.sequences = params.states.size[0];
  p.state_len = params.states.size[2];
  p.x = params.x.as<const Bits>();
  p.x_token = params.x.stride[0];
  p.x_channel = params.x.stride[1];
  p.cu_seqlens = params.cu_seqlens.data;
  p.cu_seqlens_dtype = params.cu_seqlens.dtype;
  p.cu_seqlens_step = params.cu_seqlens.stride[0];
  p.states = params.states.as<Bits>();
  p.states_sequence = params.states.stride[0];
  p.states_channel = params.states.stride[1];
  p.states_column = params.states.stride[2];
  const std::int64_t columns = p.sequences * p.state_len;
  const std::int64_t blocks = ceil_div(p.channels, kThreads);
  MAMBA_CHECK(blocks <= 0x7fffffff, "causal_conv1d_varlen_states: too many channels: ", p.channels);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(columns < kMaxGridY ? columns : kMaxGridY));
  varlen_states_kernel<Bits><<<grid, kThreads, 0, static_cast<cudaStream_t>(params.stream)>>>(p);
  MAMBA_CUDA_CHECK_LAUNCH();
}

void varlen_states(const VarlenStatesParams& params) {
  if (size_of(params.x.dtype) == 2) {
    launch<std::uint16_t>(params);
  } else {
    launch<std::uint32_t>(params);
  }
}

}  // namespace mamba_native::causal_conv1d::cuda
