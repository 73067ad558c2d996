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
  int stages;            // chunks whose x and B a CTA holds

  __device__ __forceinline__ std::int64_t head_of(int segment_index, int b, int h) const {
    return (static_cast<std::int64_t>(segment_index) * in.batch + b) * in.heads + h;
  }
  __device__ __forceinline__ States ends_of(int segment_index, int b) const {
    const std::int64_t head = static_cast<std::int64_t>(in.headdim) * in.states;
    return {ends + head_of(segment_index, b, 0) * head, 0, head, in.states, 1};
  }
};

inline constexpr int kForwardWarps = 8;
// The warp that prepares decays: above the diagonal of the scores, where it has none to compute.
inline constexpr int kForwardDecayWarp = 1;

// Who a thread is, asked again in every phase: registers have no room to keep what follows from it.
struct Worker {
  int thread = recomputed(static_cast<int>(threadIdx.x));
  int warp = thread / kWarp, lane = thread % kWarp;
};

// What a CTA keeps in shared memory, beside stages of x and B.
template <class T, int STEPS, int P, int N>
struct alignas(16) ForwardTiles {
  static constexpr int kX = kRowStride<T, P>, kB = kRowStride<T, N>, kM = kRowStride<T, STEPS>;
  T C[STEPS * kB];
  T S[P * kB];  // the state in T; later z and out pass through it
  T scores[STEPS * kM];
  T scaled_x[STEPS * kX];  // for the new state
  struct Chunk {
    std::int64_t begin;
    int steps;  // 0 after the last
    Decays<T, STEPS> decays;
  } chunks[2];
  // Where the CTA is: registers have no room for it over the whole walk.
  std::int64_t first, last;  // steps
  int segment, b, h, group, p0;
  float carry;
};
template <class T, int STEPS, int P, int N>
struct alignas(16) ForwardStage {
  T x[STEPS * kRowStride<T, P>];
  T B[STEPS * kRowStride<T, N>];
};

// The chunk from `begin` on: up to a multiple of STEPS, a sequence's end or the CTA's last step. By
// one whole warp.
template <class T, int STEPS, int P, int N>
__device__ __forceinline__ void find_chunk(typename ForwardTiles<T, STEPS, P, N>::Chunk& chunk,
                                           const ForwardTiles<T, STEPS, P, N>& tiles,
                                           const DeviceInputs<T>& in, std::int64_t begin) {
  const std::int64_t limit = min((begin / STEPS + 1) * STEPS, tiles.last);
  const std::int64_t end = begin < limit ? in.sequences.end_of(tiles.b, begin, limit) : begin;
  if (threadIdx.x % kWarp == 0) {
    chunk.begin = begin;
    chunk.steps = static_cast<int>(end - begin);
  }
}

// Start to bring in a chunk's x and B, and its C.
template <int THREADS, class T, int STEPS, int P, int N>
__device__ __forceinline__ void load_drive(
    ForwardStage<T, STEPS, P, N>& to, const DeviceInputs<T>& in,
    const ForwardTiles<T, STEPS, P, N>& tiles,
    const typename ForwardTiles<T, STEPS, P, N>::Chunk& chunk) {
  const int thread = recomputed(static_cast<int>(threadIdx.x));
  load_tile<THREADS, STEPS, P>(to.x, tiles.kX, in.x.at(tiles.b, chunk.begin, tiles.h, tiles.p0),
                               in.x.step, in.x.element, in.x.vectorize, chunk.steps,
                               in.headdim - tiles.p0, thread);
  load_tile<THREADS, STEPS, N>(to.B, tiles.kB, in.B.at(tiles.b, chunk.begin, tiles.group, 0),
                               in.B.step, in.B.element, in.B.vectorize, chunk.steps, in.states,
                               thread);
}
template <int THREADS, class T, int STEPS, int P, int N>
__device__ __forceinline__ void load_C(const ForwardArgs<T>& args,
                                       ForwardTiles<T, STEPS, P, N>& tiles,
                                       const typename ForwardTiles<T, STEPS, P, N>::Chunk& chunk) {
  if (!args.first_pass) {
    const Steps<const T>& C = args.in.C;
    load_tile<THREADS, STEPS, N>(tiles.C, tiles.kB, C.at(tiles.b, chunk.begin, tiles.group, 0),
                                 C.step, C.element, C.vectorize, chunk.steps, args.in.states,
                                 recomputed(static_cast<int>(threadIdx.x)));
  }
}

// A warp's part of the state, from channel p and state n on, as it is when a chunk begins: that of
// the segments before, or a sequence's own; to the checkpoints if there is one here.
template <int J, class T, int STEPS, int P, int N>
__device__ __forceinline__ void enter_chunk(float (&state)[J][4], const ForwardArgs<T>& args,
                                            const ForwardTiles<T, STEPS, P, N>& tiles,
                                            std::int64_t begin, int p, int n, int lane) {
  const DeviceInputs<T>& in = args.in;
  const int b = tiles.b, h = tiles.h;
  if (begin == tiles.first) {
    clear(state);
#pragma unroll 1
    for (int i = 0; i < tiles.segment && !args.first_pass; ++i) {
      const float decay = args.carries[args.head_of(i, b, h)];
      if (decay < 0.0f) {
        clear(state);
      } else {
        scale_rows(state, decay, decay);
      }
      load_states<true>(state, in, args.ends_of(i, b), 0, h, p, n, lane);
    }
  }
  const bool begins = in.sequences.begins(b, begin);
  if (begin == 0) {
    load_states(state, in, in.initial_states, in.sequences.entering(b, 0), h, p, n, lane);
  }
  if (begin % kCheckpointInterval == 0) {
    store_states(state, in, checkpoint(in, args.checkpoints, b, begin / kCheckpointInterval), 0, h,
                 p, n, lane);
  }
  if (begin > 0 && begins) {
    load_states(state, in, in.initial_states, in.sequences.entering(b, begin), h, p, n, lane);
  }
}

// y += D x, where channels count from the warp's first, p of its head, and `x` is that of its first
// step.
template <int J, class T>
__device__ __forceinline__ void add_skip(float (&y)[J][4], const Weights& D, int h, int p,
                                         int channels, const T* x, int stride, int lane) {
  const float of_head = D.at(h, 0);
  const T* const mine = x + fragment_row(lane) * stride + fragment_column(lane);
#pragma unroll
  for (int j = 0; j < J; ++j) {
    float skip[2] = {of_head, of_head};
    if (D.channel != 0) {
      const int c = 8 * j + fragment_column(lane);
      skip[0] = c < channels ? D.at(h, p + c) : 0.0f;
      skip[1] = c + 1 < channels ? D.at(h, p + c + 1) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float of_x[2];
      load_vector<2>(mine + 8 * i * stride + 8 * j, of_x);
      y[j][2 * i] = fmaf(skip[0], of_x[0], y[j][2 * i]);
      y[j][2 * i + 1] = fmaf(skip[1], of_x[1], y[j][2 * i + 1]);
    }
  }
}

// y *= silu(z), of a warp's part of y and z.
template <int J, class T>
__device__ __forceinline__ void gate(float (&y)[J][4], const T* z, int stride, int lane) {
  const T* const mine = z + fragment_row(lane) * stride + fragment_column(lane);
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float of_z[2];
      load_vector<2>(mine + 8 * i * stride + 8 * j, of_z);
      y[j][2 * i] *= fast_silu(of_z[0]);
      y[j][2 * i + 1] *= fast_silu(of_z[1]);
    }
  }
}

//   grid    (segment, b, block of P channels, head), one dimension; heads of a group are
//           neighbours, and find B and C in L2
//   CTA     walks through the segment's steps, a chunk of STEPS at a time, cut where a sequence
//           ends and at checkpoints; the state (P, N) stays in registers
//   shared  ForwardTiles and `stages` of ForwardStage
// Between barriers: scores and what the old state gives; what the scores give, the outputs and the
// new state. With two stages the next chunk comes in meanwhile, C once the scores are done; with
// one it waits for the end. The other CTA of the multiprocessor fills the waits.
template <class T, int STEPS, int P, int N>
__global__ void __launch_bounds__(kForwardWarps* kWarp, kCtas) scan(const ForwardArgs<T> args) {
  constexpr int kThreads = kForwardWarps * kWarp;
  using Tiles = ForwardTiles<T, STEPS, P, N>;
  using Stage = ForwardStage<T, STEPS, P, N>;
  using OutSplit = Split<STEPS, P, kForwardWarps>;
  using StateSplit = Split<P, N, kForwardWarps>;
  using ScoreSplit = Split<STEPS, STEPS, kForwardWarps>;
  constexpr int kX = Tiles::kX, kB = Tiles::kB, kM = Tiles::kM;
  static_assert(P >= STEPS && N >= P, "outputs are staged in the state's tile");
  static_assert(kCheckpointInterval % STEPS == 0, "checkpoints fall on chunk borders");

  extern __shared__ float4 shared_memory[];
  Tiles& tiles = *reinterpret_cast<Tiles*>(shared_memory);
  Stage* const stages = reinterpret_cast<Stage*>(&tiles + 1);

  const DeviceInputs<T>& in = args.in;
  const int channel_blocks = (in.headdim + P - 1) / P;
  const int block = static_cast<int>(blockIdx.x) / in.heads;
  if (threadIdx.x == 0) {
    tiles.segment = block / channel_blocks / in.batch;
    tiles.first = tiles.segment * args.segment;
    tiles.last = min(tiles.first + args.segment, in.length);
    tiles.b = block / channel_blocks % in.batch;
    tiles.h = static_cast<int>(blockIdx.x) % in.heads;
    tiles.group = tiles.h / in.heads_per_group;
    tiles.p0 = block % channel_blocks * P;
    tiles.carry = 1.0f;
  }
  if (threadIdx.x < kWarp) {
    __syncwarp();
    find_chunk(tiles.chunks[0], tiles, in, tiles.first);
  }
  __syncthreads();
  float state[StateSplit::kJ][4];

  load_drive<kThreads>(stages[0], in, tiles, tiles.chunks[0]);
  load_C<kThreads>(args, tiles, tiles.chunks[0]);
  if (threadIdx.x / kWarp == kForwardDecayWarp) {
    tiles.chunks[0].decays.prepare(in, tiles.b, tiles.h, tiles.first, tiles.chunks[0].steps);
  }
  for (int turn = 0; tiles.chunks[turn].steps > 0; turn ^= 1) {
    const typename Tiles::Chunk& now = tiles.chunks[turn];
    typename Tiles::Chunk& next = tiles.chunks[turn ^ 1];
    const Stage& stage = stages[turn & (args.stages - 1)];
    Stage& next_stage = stages[(turn ^ 1) & (args.stages - 1)];
    {
      const Worker me;
      const int state_p = StateSplit::row(me.warp), state_n = StateSplit::column(me.warp);
      if (me.warp == 0) {
        find_chunk(next, tiles, in, now.begin + now.steps);
      }
      if (StateSplit::active(me.warp) && state_n < in.states) {
        enter_chunk(state, args, tiles, now.begin, tiles.p0 + state_p, state_n, me.lane);
        store_fragments(state, tiles.S + state_p * kB + state_n, kB, me.lane);
      }
    }
    mamba_native::cuda::wait_for_copies();
    __syncthreads();

    float y[OutSplit::kJ][4];
    {
      const Worker me;
      if (args.stages > 1 && next.steps > 0) {
        load_drive<kThreads>(next_stage, in, tiles, next);
      }
      scale_tile<kThreads, STEPS, P>(tiles.scaled_x, stage.x, kX, DriveFactor<T, STEPS>{now.decays},
                                     me.thread);
      // Scores, in blocks of 16 x 16 on and below the diagonal.
      const int score_row = ScoreSplit::row(me.warp);
#pragma unroll 1
      for (int column = me.warp % ScoreSplit::kColumnBlocks * 16;
           column <= score_row && !args.first_pass; column += ScoreSplit::kColumnBlocks * 16) {
        float block[2][4];
        clear(block);
        multiply<2, Order::along_k, Order::along_k>(block, tiles.C + score_row * kB, kB,
                                                    stage.B + column * kB, kB, depth_of(in.states));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int t = score_row + fragment_row(me.lane) + e / 2 * 8;
            const int s = column + 8 * j + fragment_column(me.lane) + e % 2;
            const float weight = now.decays.between(s, t) * now.decays.delta[s];
            block[j][e] = s <= t ? block[j][e] * weight : 0.0f;
          }
        }
        store_fragments(block, tiles.scores + score_row * kM + column, kM, me.lane);
      }
      if (OutSplit::active(me.warp) && !args.first_pass) {
        const int row = OutSplit::row(me.warp), upper = row + fragment_row(me.lane);
        clear(y);
        multiply<OutSplit::kJ, Order::along_k, Order::along_k>(
            y, tiles.C + row * kB, kB, tiles.S + OutSplit::column(me.warp) * kB, kB,
            depth_of(in.states));
        scale_rows(y, now.decays.from_start(upper), now.decays.from_start(upper + 8));
      }
      if (me.warp == kForwardDecayWarp) {
        next.decays.prepare(in, tiles.b, tiles.h, next.begin, next.steps);
      }
    }
    __syncthreads();

    {
      const Worker me;
      const int row = OutSplit::row(me.warp), column = OutSplit::column(me.warp);
      const bool has_out = OutSplit::active(me.warp) && !args.first_pass;
      const int rows = now.steps - row, columns = in.headdim - tiles.p0 - column;
      T* const staged = tiles.S + row * kB + column;
      if (has_out && in.z.data != nullptr) {
        load_tile<kWarp, 16, OutSplit::kWidth>(
            staged, kB, in.z.at(tiles.b, now.begin + row, tiles.h, tiles.p0 + column), in.z.step,
            in.z.element, in.z.vectorize, rows, columns, me.lane);
        mamba_native::cuda::commit_copies();
      }
      if (args.stages > 1 && next.steps > 0) {
        load_C<kThreads>(args, tiles, next);
      }
      mamba_native::cuda::commit_copies();
      if (has_out) {
        multiply<OutSplit::kJ, Order::along_k, Order::across_k>(y, tiles.scores + row * kM, kM,
                                                                stage.x + column, kX, row + 16);
        if (in.D.data != nullptr) {
          add_skip(y, in.D, tiles.h, tiles.p0 + column, columns, stage.x + row * kX + column, kX,
                   me.lane);
        }
        if (in.z.data != nullptr) {
          mamba_native::cuda::wait_for_all_copies_but<1>();
          __syncwarp();
          gate(y, staged, kB, me.lane);
          __syncwarp();
        }
        store_fragments(y, staged, kB, me.lane);
        __syncwarp();
        store_tile<kWarp, 16, OutSplit::kWidth>(
            staged, kB, args.out.at(tiles.b, now.begin + row, tiles.h, tiles.p0 + column),
            args.out.step, args.out.element, args.out.vectorize, rows, columns, me.lane);
      }
    }
    {
      const Worker me;
      const int state_p = StateSplit::row(me.warp), state_n = StateSplit::column(me.warp);
      if (StateSplit::active(me.warp) && state_n < in.states) {
        const std::int64_t t = now.begin + now.steps - 1;
        const float decay = now.decays.whole();
        scale_rows(state, decay, decay);
        multiply<StateSplit::kJ, Order::across_k, Order::across_k>(
            state, tiles.scaled_x + state_p, kX, stage.B + state_n, kB, STEPS);
        if (in.sequences.ends(tiles.b, t)) {
          store_states(state, in, args.last_states, in.sequences.leaving(tiles.b, t), tiles.h,
                       tiles.p0 + state_p, state_n, me.lane);
        }
      }
      if (args.first_pass && me.thread == 0) {
        const bool passes = !in.sequences.begins(tiles.b, now.begin) && tiles.carry >= 0.0f;
        tiles.carry = passes ? tiles.carry * now.decays.whole() : -1.0f;
      }
    }
    __syncthreads();
    if (args.stages == 1 && next.steps > 0) {
      load_drive<kThreads>(next_stage, in, tiles, next);
      load_C<kThreads>(args, tiles, next);
    }
  }
  if (args.first_pass) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    if (StateSplit::active(warp)) {
      store_states(state, in, args.ends_of(tiles.segment, tiles.b), 0, tiles.h,
                   tiles.p0 + StateSplit::row(warp), StateSplit::column(warp),
                   static_cast<int>(threadIdx.x) % kWarp);
    }
    if (threadIdx.x == 0 && tiles.p0 == 0) {
      args.carries[args.head_of(tiles.segment, tiles.b, tiles.h)] = tiles.carry;
    }
  }
}

template <class T>
using ForwardKernel = void (*)(ForwardArgs<T>);

template <class T, std::size_t I>
constexpr ForwardKernel<T> forward_kernel() {
  constexpr Config kConfig = config_of(static_cast<int>(I), sizeof(T));
  static_assert(
      sizeof(ForwardTiles<T, kConfig.steps, kConfig.headdim, kConfig.states>) +
              2 * sizeof(ForwardStage<T, kConfig.steps, kConfig.headdim, kConfig.states>) ==
          forward_shared_memory(kConfig, sizeof(T), 2),
      "plan.h knows what a CTA needs");
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
  args.stages = plan.stages;
  args.ends = workspace + plan.states;
  args.carries = workspace + plan.decays;

  const ForwardKernel<T> kernel =
      find_forward_kernel<T>(plan.config, std::make_index_sequence<kConfigCount>());
  const std::int64_t shared = forward_shared_memory(config, sizeof(T), plan.stages);
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
