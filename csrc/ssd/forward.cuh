// The forward kernel and its host launcher. For every batch b, head h, and steps t of a chunk that
// begins with the state S[-1] (the room's README derives it):
//   out[t] = sum_{s <= t} (C[t].B[s]) decay(s, t) delta[s] x[s] + decay(-1, t) S[-1] C[t] + D x[t]
//   S[end] = decay(-1, end) S[-1] + sum_s decay(s, end) delta[s] x[s] B[s]^T
#pragma once

#include <utility>

#include "ssd/tensors.cuh"

namespace mamba_native::ssd::cuda {

template <class T>
struct ForwardArgs {
  DeviceInputs<T> in;
  Steps<T> out;
  States last_states;
  float* checkpoints;    // (B, blocks, H, P, N), contiguous; may be null
  std::int64_t segment;  // steps of a CTA
  float* ends;           // (segments - 1, B, H, P, N): the last states of each segment, as if those
                         // that go on from the one before began with zero
  float* carries;        // (segments - 1, B, H): how much of the state goes through each; negative
                         // where none does, because a sequence begins
  bool first_pass;       // fills both in; else the outputs

  __device__ __forceinline__ std::int64_t head_of(int segment_index, int b, int h) const {
    return (static_cast<std::int64_t>(segment_index) * in.batch + b) * in.heads + h;
  }
  __device__ __forceinline__ States ends_of(int segment_index, int b) const {
    const std::int64_t head = static_cast<std::int64_t>(in.headdim) * in.states;
    return {ends + head_of(segment_index, b, 0) * head, 0, head, in.states, 1};
  }
};

inline constexpr int kForwardWarps = 8;

//   grid    (segment, b, block of P channels, head), one dimension; heads of a group are
//           neighbours, and find B and C in L2
//   CTA     walks through the segment's steps, a chunk of STEPS at a time, cut where a sequence
//   ends
//           and at checkpoints; the state (P, N) stays in registers
//   shared  the chunk's x, B, C; the state in T; the scores; x scaled for the new state
// Between barriers: bring the chunk in; scores and what the old state gives; what the scores give,
// the outputs and the new state. Other CTAs of the multiprocessor fill the waits.
template <class T, int STEPS, int P, int N>
__global__ void __launch_bounds__(kForwardWarps* kWarp, kCtas) scan(const ForwardArgs<T> args) {
  constexpr int kThreads = kForwardWarps * kWarp;
  using OutSplit = Split<STEPS, P, kForwardWarps>;
  using StateSplit = Split<P, N, kForwardWarps>;
  using ScoreSplit = Split<STEPS, STEPS, kForwardWarps>;
  constexpr int kX = kRowStride<T, P>, kB = kRowStride<T, N>, kM = kRowStride<T, STEPS>;
  static_assert(N >= P, "outputs are staged in C's tile");
  static_assert(kCheckpointInterval % STEPS == 0, "checkpoints fall on chunk borders");

  extern __shared__ float4 shared_memory[];
  T* const x = reinterpret_cast<T*>(shared_memory);
  T* const scaled_x = x + STEPS * kX;
  T* const B = scaled_x + STEPS * kX;
  T* const C = B + STEPS * kB;
  T* const S = C + STEPS * kB;
  T* const scores = S + P * kB;
  Decays<T, STEPS>& decays = *reinterpret_cast<Decays<T, STEPS>*>(scores + STEPS * kM);
  float& carry = *reinterpret_cast<float*>(&decays + 1);  // thread 0's

  const DeviceInputs<T>& in = args.in;
  const int channel_blocks = (in.headdim + P - 1) / P;
  const int block = static_cast<int>(blockIdx.x) / in.heads;
  const int b = block / channel_blocks % in.batch;
  const int segment = block / channel_blocks / in.batch;
  const std::int64_t first = segment * args.segment;
  const std::int64_t last = min(first + args.segment, in.length);
  float state[StateSplit::kJ][4];
  if (threadIdx.x == 0) {
    carry = 1.0f;
  }

  std::int64_t end = first;
  for (std::int64_t begin = first; begin < last; begin = end) {
    const int thread = recomputed(static_cast<int>(threadIdx.x));
    const int warp = thread / kWarp, lane = thread % kWarp;
    const int h = recomputed(static_cast<int>(blockIdx.x) % in.heads);
    const int p0 = recomputed(block % channel_blocks) * P;
    const int group = h / in.heads_per_group;
    const int channels = min(P, in.headdim - p0);
    const int state_p = StateSplit::row(warp), state_n = StateSplit::column(warp);
    const bool has_state = StateSplit::active(warp) && state_n < in.states;
    const int row = OutSplit::row(warp), column = OutSplit::column(warp);
    const bool has_out = OutSplit::active(warp) && !args.first_pass;
    end = in.sequences.end_of(b, begin, min((begin / STEPS + 1) * STEPS, last));
    const int steps = static_cast<int>(end - begin);

    if (has_state) {
      const States to = checkpoint(in, args.checkpoints, b, begin / kCheckpointInterval);
      const bool at_checkpoint = begin % kCheckpointInterval == 0;
      if (begin == first) {
        clear(state);
#pragma unroll 1
        for (int i = 0; i < segment && !args.first_pass; ++i) {
          const float decay = args.carries[args.head_of(i, b, h)];
          if (decay < 0.0f) {
            clear(state);
          } else {
            scale_rows(state, decay, decay);
          }
          load_states<true>(state, in, args.ends_of(i, b), 0, h, p0 + state_p, state_n, lane);
        }
      }
      if (at_checkpoint && begin > 0) {
        store_states(state, in, to, 0, h, p0 + state_p, state_n, lane);
      }
      if (in.sequences.begins(b, begin)) {
        load_states(state, in, in.initial_states, in.sequences.entering(b, begin), h, p0 + state_p,
                    state_n, lane);
      }
      if (begin == 0) {
        store_states(state, in, to, 0, h, p0 + state_p, state_n, lane);
      }
      store_fragments(state, S + state_p * kB + state_n, kB, lane);
    }
    load_tile<T, STEPS, P>(x, kX, in.x.at(b, begin, h, p0), in.x.step, in.x.element, in.x.vectorize,
                           steps, channels, thread, kThreads);
    load_tile<T, STEPS, N>(B, kB, in.B.at(b, begin, group, 0), in.B.step, in.B.element,
                           in.B.vectorize, steps, in.states, thread, kThreads);
    if (!args.first_pass) {
      load_tile<T, STEPS, N>(C, kB, in.C.at(b, begin, group, 0), in.C.step, in.C.element,
                             in.C.vectorize, steps, in.states, thread, kThreads);
    }
    if (warp == 0) {
      decays.prepare(in, b, h, begin, steps);
    }
    mamba_native::cuda::wait_for_copies();
    __syncthreads();

    scale_tile<T, STEPS, P>(scaled_x, x, kX, DriveFactor<T, STEPS>{decays}, thread, kThreads);
    // Scores, in blocks of 16 x 16 on and below the diagonal.
    const int score_row = ScoreSplit::row(warp);
    for (int column = warp % ScoreSplit::kColumnBlocks * 16;
         column <= score_row && !args.first_pass; column += ScoreSplit::kColumnBlocks * 16) {
      float block[2][4];
      clear(block);
      multiply<2, Order::along_k, Order::along_k>(block, C + score_row * kB, kB, B + column * kB,
                                                  kB, depth_of(in.states));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int t = score_row + fragment_row(lane) + e / 2 * 8;
          const int s = column + 8 * j + fragment_column(lane) + e % 2;
          block[j][e] = s <= t ? block[j][e] * decays.between(s, t) * decays.delta[s] : 0.0f;
        }
      }
      store_fragments(block, scores + score_row * kM + column, kM, lane);
    }
    float y[OutSplit::kJ][4];
    const int upper = row + fragment_row(lane), lower = upper + 8;
    if (has_out) {
      clear(y);
      multiply<OutSplit::kJ, Order::along_k, Order::along_k>(y, C + row * kB, kB, S + column * kB,
                                                             kB, depth_of(in.states));
      scale_rows(y, decays.from_start(upper), decays.from_start(lower));
    }
    __syncthreads();

    if (has_out) {
      multiply<OutSplit::kJ, Order::along_k, Order::across_k>(y, scores + row * kM, kM, x + column,
                                                              kX, row + 16);
      // z, then out, pass through the warp's part of C's tile.
      T* const stage = C + row * kB + column;
      if (in.z.data != nullptr) {
        load_tile<T, 16, OutSplit::kWidth>(stage, kB, in.z.at(b, begin + row, h, p0 + column),
                                           in.z.step, in.z.element, in.z.vectorize, steps - row,
                                           channels - column, lane, kWarp);
        mamba_native::cuda::wait_for_copies();
        __syncwarp();
      }
      const float skip_of_head = in.D.at(h, 0);
#pragma unroll
      for (int j = 0; j < OutSplit::kJ; ++j) {
        const int p = column + 8 * j + fragment_column(lane);
        float skip[2] = {skip_of_head, skip_of_head};
        if (in.D.channel != 0) {
          skip[0] = in.D.at(h, p0 + min(p, channels - 1));
          skip[1] = in.D.at(h, p0 + min(p + 1, channels - 1));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int t = i == 0 ? upper : lower;
          float of_x[2];
          load_vector<2>(x + t * kX + p, of_x);
          y[j][2 * i] = fmaf(skip[0], of_x[0], y[j][2 * i]);
          y[j][2 * i + 1] = fmaf(skip[1], of_x[1], y[j][2 * i + 1]);
          if (in.z.data != nullptr) {
            float gate[2];
            load_vector<2>(C + t * kB + p, gate);
            y[j][2 * i] *= fast_silu(gate[0]);
            y[j][2 * i + 1] *= fast_silu(gate[1]);
          }
        }
      }
      __syncwarp();
      store_fragments(y, stage, kB, lane);
      __syncwarp();
      store_tile<T, 16, OutSplit::kWidth>(stage, kB, args.out.at(b, begin + row, h, p0 + column),
                                          args.out.step, args.out.element, args.out.vectorize,
                                          steps - row, channels - column, lane, kWarp);
    }
    if (has_state) {
      const float decay = decays.whole();
      scale_rows(state, decay, decay);
      multiply<StateSplit::kJ, Order::across_k, Order::across_k>(state, scaled_x + state_p, kX,
                                                                 B + state_n, kB, STEPS);
      if (in.sequences.ends(b, end - 1)) {
        store_states(state, in, args.last_states, in.sequences.leaving(b, end - 1), h, p0 + state_p,
                     state_n, lane);
      }
    }
    if (args.first_pass && thread == 0) {
      carry = in.sequences.begins(b, begin) || carry < 0.0f ? -1.0f : carry * decays.whole();
    }
    __syncthreads();
  }
  if (args.first_pass) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int h = static_cast<int>(blockIdx.x) % in.heads;
    const int p0 = block % channel_blocks * P;
    if (StateSplit::active(warp)) {
      store_states(state, in, args.ends_of(segment, b), 0, h, p0 + StateSplit::row(warp),
                   StateSplit::column(warp), static_cast<int>(threadIdx.x) % kWarp);
    }
    if (threadIdx.x == 0 && p0 == 0) {
      args.carries[args.head_of(segment, b, h)] = carry;
    }
  }
}

template <class T>
using ForwardKernel = void (*)(ForwardArgs<T>);

template <class T, std::size_t I>
constexpr ForwardKernel<T> forward_kernel() {
  constexpr Config kConfig = config_of(static_cast<int>(I), sizeof(T));
  return &scan<T, kConfig.steps, kConfig.headdim, kConfig.states>;
}

template <class T, std::size_t... I>
ForwardKernel<T> find_forward_kernel(int index, std::index_sequence<I...>) {
  static constexpr ForwardKernel<T> kKernels[] = {forward_kernel<T, I>()...};
  return kKernels[index];
}

template <class Host>
void forward(const ForwardParams& params) {
  using T = mamba_native::cuda::DeviceType<Host>;
  ForwardArgs<T> args;
  args.in = device_inputs<T>(params.in);
  args.out = steps<T>(params.out);
  args.checkpoints = nullptr;

  const ForwardPlan plan = plan_forward(params.in);
  const Config& config = config_of(plan.config, sizeof(T));
  float* const workspace = params.workspace.as<float>();
  args.segment = plan.segment;
  args.ends = workspace + plan.states;
  args.carries = workspace + plan.decays;

  const ForwardKernel<T> kernel =
      find_forward_kernel<T>(plan.config, std::make_index_sequence<kConfigCount>());
  const std::int64_t shared = forward_shared_memory(config, sizeof(T));
  const std::int64_t ctas =
      params.in.x.size[0] * params.in.x.size[2] * ceil_div(params.in.x.size[3], config.headdim);
  if (plan.segments > 1) {
    args.first_pass = true;
    launch(kernel, ctas * (plan.segments - 1), kForwardWarps, shared, args, params.stream);
  }
  args.first_pass = false;
  args.last_states = states(params.last_states);
  args.checkpoints = params.checkpoints.as<float>();
  launch(kernel, ctas * plan.segments, kForwardWarps, shared, args, params.stream);
}

}  // namespace mamba_native::ssd::cuda
