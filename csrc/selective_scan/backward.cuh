// Backward kernel and its host launcher. With g[t] = dout[t] silu(z[t]) (dout without z), the
// adjoint state q[t] = C[n,t] g[t] + exp(delta[t+1] A) q[t+1] runs backward in time, and with
// w[t] = exp(delta[t] A) h[t-1]:
//   du = D g + delta sum_n q B          ddelta = (u sum_n q B + sum_n q A w) softplus'
//   dz = dout y silu'(z)                dA = sum_bt q delta w
//   dB = sum_d q delta u                dC = sum_d g h
//   dD = sum_bt g u                     ddelta_bias = sum_bt ddelta
// The README of this room derives this and says where the time goes.
#pragma once

#include <utility>

#include "core/cuda/launch.h"
#include "selective_scan/plan.h"
#include "selective_scan/tensors.cuh"

namespace mamba_native::selective_scan::cuda {

using mamba_native::cuda::atomic_add4;
using mamba_native::cuda::warp_sum;

// dB or dC: contiguous (B, G, N, L), or (D, N) for a constant coefficient.
struct CoefficientGradient {
  float* data;
  bool constant;
  bool vectorize;  // rows are 16-byte aligned
};

template <class T>
struct BackwardArgs {
  DeviceInputs<T> in;
  Sequence<const T> dout;
  Weights<const float> dlast_state;
  const float* checkpoints;  // (B, D, tiles, N), contiguous
  Sequence<T> du, ddelta, dz;
  Weights<float> dA, dD, ddelta_bias, dinitial_state;
  CoefficientGradient dB, dC;
};

// Sums that many CTAs add to start from zero. One launch clears them all.
//   grid    (blocks, block), a grid-stride loop over each block's elements
struct Matrix {
  float* data = nullptr;
  std::int64_t rows = 0, columns = 0, row = 0, column = 0;
};
inline constexpr int kCleared = 5;
struct Matrices {
  Matrix all[kCleared];
};

static __global__ void clear(const Matrices matrices) {
  const Matrix& matrix = matrices.all[blockIdx.y];
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < matrix.rows * matrix.columns; i += step) {
    matrix.data[i / matrix.columns * matrix.row + i % matrix.columns * matrix.column] = 0.0f;
  }
}

// A constant coefficient belongs to one channel, and its gradient sums over time: over the warp.
__device__ __forceinline__ void add_over_time(float* to, const float (&values)[kItems], int lane,
                                              bool active) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    sum += values[i];
  }
  sum = warp_sum(sum);
  if (active && lane == 0) {
    atomicAdd(to, sum);
  }
}

// One lane's kItems values into an exchange buffer: four and four, so that neighbouring lanes write
// neighbouring vectors.
__device__ __forceinline__ void exchange_put(float* to, const float (&values)[kItems]) {
  *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  *reinterpret_cast<float4*>(to + 4 * kWarp) =
      make_float4(values[4], values[5], values[6], values[7]);
}

// CTAs that the register budget keeps on one multiprocessor. Before Hopper, ptxas spills where it
// must fit eight warps into 128 registers each.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int resident_blocks(int warps, int blocks) { return warps == 8 ? 1 : blocks; }
#else
constexpr int resident_blocks(int, int blocks) { return blocks; }
#endif

// Lanes over time, any d_state.
//   grid    (b, group, block of WARPS channels of the group), one dimension
//   CTA     warp = one channel, lane = kItems steps of a tile of kCheckpointInterval steps
//   shared  per warp: two exchange buffers for dB and dC (kItems of each per lane), a staging area
//           for dA of kBackwardStage states, the adjoint carry of every state
// Tiles run from the last to the first, each from the checkpoint that entered it. For every state:
// decays once, then the forward and the adjoint recurrence together (local run, one scan over the
// warp for both directions, second run), and the channel's share of dB and dC goes through shared
// memory, where the CTA sums its channels before one atomic per 4 steps.
template <class T, int WARPS, int BLOCKS>
__global__ void __launch_bounds__(WARPS* kWarp, resident_blocks(WARPS, BLOCKS))
    scan_backward(const BackwardArgs<T> args) {
  constexpr int kThreads = WARPS * kWarp;
  constexpr int kExchange = 2 * kItems * kWarp;  // floats per warp and buffer: dB and dC
  constexpr int kStageStride = kWarp + 1;        // so that columns fall into different banks
  extern __shared__ float4 shared_memory[];

  const DeviceInputs<T>& in = args.in;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float* const exchange = reinterpret_cast<float*>(shared_memory);
  float* const stage = exchange + 2 * WARPS * kExchange + warp * kBackwardStage * kStageStride;
  float* const carries =
      exchange + WARPS * (2 * kExchange + kBackwardStage * kStageStride) + warp * in.d_state;

  const int blocks = (in.channels_per_group + WARPS - 1) / WARPS;
  const int in_group = static_cast<int>(blockIdx.x) % blocks * WARPS + warp;
  const int group = static_cast<int>(blockIdx.x) / blocks % in.groups;
  const int b = static_cast<int>(blockIdx.x) / blocks / in.groups;
  // A warp beyond the group's end keeps up with the barriers and contributes zeros.
  const bool active = in_group < in.channels_per_group;
  const int c = group * in.channels_per_group + (active ? in_group : 0);
  const bool exchanges = !(args.dB.constant && args.dC.constant);

  const CoefficientRows<T> rows_b(in.B, b, group, c);
  const CoefficientRows<T> rows_c(in.C, b, group, c);
  const std::int64_t first_row = (static_cast<std::int64_t>(b) * in.groups + group) * in.d_state;
  float sum_dD = 0.0f, sum_dbias = 0.0f;
  int buffer = 0;

  for (int tile = in.tiles - 1; tile >= 0; --tile) {
    const std::int64_t t0 = static_cast<std::int64_t>(tile) * kCheckpointInterval;
    const std::int64_t first = t0 + lane * kItems;
    const int valid = active ? valid_items(in.length, first) : 0;
    float delta[kItems], x[kItems], g[kItems];
    float elapsed = 0.0f;  // sum of delta over the lane's steps
    in.delta.load(b, c, first, valid).floats(delta);
    in.u.load(b, c, first, valid).floats(x);
    args.dout.load(b, c, first, valid).floats(g);
    discretise(delta, in.delta_bias.get(0, c, 0), in.delta_softplus, valid);
    if (in.z.data != nullptr) {
      float z[kItems];
      in.z.load(b, c, first, valid).floats(z);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        g[i] *= fast_silu(z[i]);
      }
    }
    float sum_qb[kItems], sum_qaw[kItems], y[kItems];  // over the states
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      sum_dD = fmaf(g[i], x[i], sum_dD);
      x[i] *= delta[i];
      elapsed += delta[i];
      sum_qb[i] = sum_qaw[i] = y[i] = 0.0f;
    }

    for (int n0 = 0; n0 < in.d_state; n0 += kWarp) {
      // Lane l holds what belongs to state n0 + l.
      const int states = min(kWarp, in.d_state - n0);
      float rates = 0.0f, entering_states = 0.0f, carry = 0.0f;
      if (active && lane < states) {
        rates = in.A.at(0, c, n0 + lane);
        entering_states = args.checkpoints[checkpoint_offset(in, b, c, tile) + n0 + lane];
        carry = tile + 1 == in.tiles ? args.dlast_state.get(b, c, n0 + lane) : carries[n0 + lane];
      }

#pragma unroll 1
      for (int j = 0; j < states; ++j) {
        const int n = n0 + j;
        float b_values[kItems], c_values[kItems];
        rows_b.values(rows_b.load(n, first, valid), n, true, b_values);
        rows_c.values(rows_c.load(n, first, valid), n, true, c_values);
        const float rate = __shfl_sync(kAllLanes, rates, j);
        const float tile_state = __shfl_sync(kAllLanes, entering_states, j);
        const float tile_adjoint = __shfl_sync(kAllLanes, carry, j);

        float decay[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          decay[i] = exp2_approx(delta[i] * (rate * kLog2E));
        }
        float h_span = exp2_approx(elapsed * (rate * kLog2E));
        float q_span = h_span;
        float h = x[0] * b_values[0];
        float q = g[kItems - 1] * c_values[kItems - 1];
#pragma unroll
        for (int i = 1; i < kItems; ++i) {
          h = fmaf(decay[i], h, x[i] * b_values[i]);
          q = fmaf(decay[kItems - i], q, g[kItems - 1 - i] * c_values[kItems - 1 - i]);
        }
        q *= decay[0];  // what a lane hands to the lane before it
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
          const float h_before = __shfl_up_sync(kAllLanes, h, offset);
          const float h_span_before = __shfl_up_sync(kAllLanes, h_span, offset);
          const float q_after = __shfl_down_sync(kAllLanes, q, offset);
          const float q_span_after = __shfl_down_sync(kAllLanes, q_span, offset);
          if (lane >= offset) {
            h = fmaf(h_span, h_before, h);
            h_span *= h_span_before;
          }
          if (lane + offset < kWarp) {
            q = fmaf(q_span, q_after, q);
            q_span *= q_span_after;
          }
        }
        h = __shfl_up_sync(kAllLanes, fmaf(h_span, tile_state, h), 1);
        h = lane == 0 ? tile_state : h;
        const float handed = fmaf(q_span, tile_adjoint, q);
        q = __shfl_down_sync(kAllLanes, handed, 1);
        q = lane == kWarp - 1 ? tile_adjoint : q;
        const float tile_start = __shfl_sync(kAllLanes, handed, 0);
        carry = lane == j ? tile_start : carry;

        // Two exchange buffers: whoever still sums this one's last use has yet to arrive at the
        // barrier of the other's.
        float* const mine = exchange + (buffer * WARPS + warp) * kExchange + lane * 4;
        float w[kItems], gradient[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          w[i] = decay[i] * h;
          h = fmaf(x[i], b_values[i], w[i]);
          gradient[i] = g[i] * h;
          y[i] = fmaf(c_values[i], h, y[i]);
        }
        if (args.dC.constant) {
          add_over_time(args.dC.data + static_cast<std::int64_t>(c) * in.d_state + n, gradient,
                        lane, active);
        } else {
          exchange_put(mine + kExchange / 2, gradient);
        }
        float dA = 0.0f;
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i) {
          q = i == kItems - 1 ? fmaf(g[i], c_values[i], q)
                              : fmaf(decay[i + 1], q, g[i] * c_values[i]);
          const float qw = q * w[i];
          sum_qb[i] = fmaf(q, b_values[i], sum_qb[i]);
          sum_qaw[i] = fmaf(rate, qw, sum_qaw[i]);
          dA = fmaf(delta[i], qw, dA);
          gradient[i] = q * x[i];
        }

        if (args.dB.constant) {
          add_over_time(args.dB.data + static_cast<std::int64_t>(c) * in.d_state + n, gradient,
                        lane, active);
        } else {
          exchange_put(mine, gradient);
        }

        // dA: stage one value per lane and state; every kBackwardStage states, four lanes sum one
        // state's 32 values.
        stage[j % kBackwardStage * kStageStride + lane] = dA;
        if (j % kBackwardStage == kBackwardStage - 1 || j == states - 1) {
          __syncwarp();
          const int slot = lane % kBackwardStage;
          const float* const from = stage + slot * kStageStride + lane / kBackwardStage * 8;
          float sum = 0.0f;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            sum += from[i];
          }
          sum += __shfl_xor_sync(kAllLanes, sum, 8);
          sum += __shfl_xor_sync(kAllLanes, sum, 16);
          if (active && lane <= j % kBackwardStage) {
            atomicAdd(&args.dA.at(0, c, n - j % kBackwardStage + slot), sum);
          }
          __syncwarp();
        }

        if (exchanges) {
          __syncthreads();
          const float* const all = exchange + buffer * WARPS * kExchange;
          // Half the warps suffice; they take turns.
          constexpr int kSums = kExchange / 4;
          const int turn = static_cast<int>(threadIdx.x + buffer * (kThreads / 2)) % kThreads;
          for (int v = turn; v < kSums; v += kThreads) {
            const bool is_c = v >= kSums / 2;
            const CoefficientGradient& to = is_c ? args.dC : args.dB;
            if (to.constant) {
              continue;
            }
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int k = 0; k < WARPS; ++k) {
              const float4 part = *reinterpret_cast<const float4*>(all + k * kExchange + v * 4);
              sum[0] += part.x;
              sum[1] += part.y;
              sum[2] += part.z;
              sum[3] += part.w;
            }
            // v = (dB or dC, steps 0-3 or 4-7 of a lane, lane)
            const std::int64_t t = t0 + v % kWarp * kItems + v / kWarp % 2 * 4;
            float* const at = to.data + (first_row + n) * in.length + t;
            if (to.vectorize && t < in.length) {
              atomic_add4(at, sum[0], sum[1], sum[2], sum[3]);
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                if (t + i < in.length) {
                  atomicAdd(at + i, sum[i]);
                }
              }
            }
          }
          buffer ^= 1;
        }
      }
      if (lane < states) {
        carries[n0 + lane] = carry;
        if (tile == 0 && active && args.dinitial_state.data != nullptr) {
          args.dinitial_state.at(b, c, n0 + lane) = carry;
        }
      }
    }

    // The activations again: they come from the cache, and registers were short in between.
    const int row = recomputed(c);
    const std::int64_t start =
        static_cast<std::int64_t>(recomputed(tile)) * kCheckpointInterval + lane * kItems;
    const int exist = active ? valid_items(in.length, start) : 0;
    const float bias = in.delta_bias.get(0, row, 0);
    const float skip = in.D.get(0, row, 0);
    float u[kItems], raw_delta[kItems], out[kItems];
    in.u.load(b, row, start, exist).floats(u);
    in.delta.load(b, row, start, exist).floats(raw_delta);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      out[i] = fmaf(sum_qb[i], delta[i], skip * g[i]);
    }
    args.du.store(b, row, start, exist, out);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float value = raw_delta[i] + bias;
      const float slope =
          in.delta_softplus && value <= kSoftplusThreshold ? fast_sigmoid(value) : 1.0f;
      out[i] = i < exist ? fmaf(sum_qb[i], u[i], sum_qaw[i]) * slope : 0.0f;
      sum_dbias += out[i];
    }
    args.ddelta.store(b, row, start, exist, out);
    if (in.z.data != nullptr) {
      float z[kItems], dout[kItems];
      in.z.load(b, row, start, exist).floats(z);
      args.dout.load(b, row, start, exist).floats(dout);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        out[i] = dout[i] * fmaf(skip, u[i], y[i]) * fast_silu_grad(z[i]);
      }
      args.dz.store(b, row, start, exist, out);
    }
  }

  sum_dD = warp_sum(sum_dD);
  sum_dbias = warp_sum(sum_dbias);
  if (active && lane == 0) {
    if (args.dD.data != nullptr) {
      atomicAdd(&args.dD.at(0, c, 0), sum_dD);
    }
    if (args.ddelta_bias.data != nullptr) {
      atomicAdd(&args.ddelta_bias.at(0, c, 0), sum_dbias);
    }
  }
}

template <class T>
using BackwardKernel = void (*)(BackwardArgs<T>);

// The kernels of kBackwardConfigs, row by row.
template <class T, std::size_t... I>
BackwardKernel<T> find_backward_kernel(int index, std::index_sequence<I...>) {
  static constexpr BackwardKernel<T> kKernels[] = {
      &scan_backward<T, kBackwardConfigs[I].warps, kBackwardConfigs[I].blocks>...};
  return kKernels[index];
}

inline CoefficientGradient coefficient_gradient(const TensorView& tensor, std::int64_t length) {
  CoefficientGradient out;
  out.data = tensor.as<float>();
  out.constant = tensor.dim == 2;
  out.vectorize = length % 4 == 0 && reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0;
  return out;
}

// Any (D, N) or (D) view, or a contiguous one of any shape.
inline Matrix matrix(const TensorView& tensor) {
  Matrix out;
  if (!tensor.present()) {
    return out;
  }
  out.data = tensor.as<float>();
  out.rows = tensor.dim == 4 ? 1 : tensor.size[0];
  out.columns = tensor.numel() / out.rows;
  out.row = tensor.stride[0];
  out.column = tensor.dim == 2 ? tensor.stride[1] : 1;
  return out;
}

inline void clear_sums(const BackwardParams& params, cudaStream_t stream) {
  constexpr int kThreads = 256;
  constexpr std::int64_t kMostBlocks = 1024;
  const Matrices matrices{{matrix(params.dA), matrix(params.dB), matrix(params.dC),
                           matrix(params.dD), matrix(params.ddelta_bias)}};
  std::int64_t elements = 0;
  for (const Matrix& each : matrices.all) {
    elements = each.rows * each.columns > elements ? each.rows * each.columns : elements;
  }
  const std::int64_t blocks = ceil_div(elements, kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kCleared);
  clear<<<grid, kThreads, 0, stream>>>(matrices);
  MAMBA_CUDA_CHECK_LAUNCH();
}

template <class Host>
void backward(const BackwardParams& params) {
  using T = mamba_native::cuda::DeviceType<Host>;
  const Problem problem = problem_of(params.in);
  const int index = choose_backward(
      problem, mamba_native::cuda::device_info(params.in.u.device.index), params.config);
  const BackwardConfig& config = kBackwardConfigs[index];
  const cudaStream_t stream = static_cast<cudaStream_t>(params.stream);

  BackwardArgs<T> args;
  args.in = device_inputs<T>(params.in, problem.groups);
  args.dout = sequence<const T>(params.dout);
  args.dlast_state = weights<const float>(params.dlast_state);
  args.checkpoints = params.checkpoints.as<const float>();
  args.du = sequence<T>(params.du);
  args.ddelta = sequence<T>(params.ddelta);
  args.dz = sequence<T>(params.dz);
  args.dA = weights<float>(params.dA);
  args.dD = weights<float>(params.dD);
  args.ddelta_bias = weights<float>(params.ddelta_bias);
  args.dinitial_state = weights<float>(params.dinitial_state);
  args.dB = coefficient_gradient(params.dB, problem.length);
  args.dC = coefficient_gradient(params.dC, problem.length);

  clear_sums(params, stream);
  const BackwardKernel<T> kernel =
      find_backward_kernel<T>(index, std::make_index_sequence<kBackwardConfigCount>());
  const int shared = static_cast<int>(backward_shared_memory(config.warps, problem.d_state));
  mamba_native::cuda::allow_shared_memory(kernel, shared);
  const std::int64_t blocks = problem.groups * ceil_div(problem.channels_per_group(), config.warps);
  kernel<<<static_cast<unsigned>(count(problem.batch * blocks)), config.warps * kWarp, shared,
           stream>>>(args);
  MAMBA_CUDA_CHECK_LAUNCH();
}

}  // namespace mamba_native::selective_scan::cuda
