// The chunked scan of Mamba-2, state space duality (Dao & Gu 2024, sections 5 and 6), forward and
// backward.
//
// For every batch b and head h, with the group g = h / (H / G), state S (P, N):
//   raw[t]   = dt[b,t,h] + dt_bias[h]
//   delta[t] = min(max(softplus?(raw[t]), dt_min), dt_max)
//   S[t]     = exp(delta[t] A[h]) S[t-1] + delta[t] x[b,t,h,:] B[b,t,g,:]^T
//   S[-1]    = initial_states[b,h]
//   y[t]     = S[t] C[b,t,g,:] + D[h] x[b,t,h,:]
//   out[t]   = y[t] silu(z[b,t,h,:]) with z, y[t] without
//
// With `reverse` the scan runs from the last step to the first: S[t] follows S[t+1],
// initial_states enter at step L-1 and last_states are S[0]. It is the scan of the sequence read
// backwards, without a copy.
//
// `seq_idx` packs several sequences into a batch entry: the state starts from zero wherever seq_idx
// differs from the step visited before. initial_states still enter at the first step visited, and
// last_states are the states after the last one.
//
// `sequences` = S > 0 numbers them (B = 1, with seq_idx): states then have a row per sequence,
// (S, H, P, N) instead of (B, H, P, N). Sequence s is the steps with seq_idx = s, which must be
// adjacent; it starts from initial_states[s] and leaves last_states[s]. One without steps leaves
// the state it began with. Steps with an index outside [0, S) start from zero and leave nothing.
//
// Sizes: B batch, L length, H heads, P headdim, G groups of heads that share B and C (H % G == 0),
// N d_state; P, N, G > 0. B = 0, L = 0 and H = 0 are valid: outputs are empty, last_states are the
// initial states, sums are 0.
// On CUDA N is at most 256; in backward on sm_75, whose shared memory is small, at most 128.
//
// Dtypes: x, B, C, z share one dtype T of float32, float16, bfloat16 (or float64 on the CPU). dt is
// T or float32. Everything else is float32 (float64 if T is). Arithmetic and state are float32.
//
// Strides: any for every input, 0 included, and any alignment. Outputs may have any strides that do
// not overlap. `checkpoints`, dB and dC are contiguous.
//
// How the length is cut into chunks is the implementation's business and changes results by
// rounding only.
//
// Errors: every function throws mamba_native::Error that names the argument, before memory is
// touched. CUDA work is enqueued on `stream` of the inputs' device, which the caller has made
// current; nothing synchronises or allocates, so calls can be captured in CUDA graphs.
#pragma once

#include <cstdint>
#include <limits>

#include "core/tensor.h"

namespace mamba_native::ssd {

// Steps between two stored states: `checkpoints` has ceil(L / kCheckpointInterval) of them.
inline constexpr std::int64_t kCheckpointInterval = 256;

// What forward and backward both read.
struct Inputs {
  TensorView x;               // (B, L, H, P) T
  TensorView dt;              // (B, L, H) T or float32
  TensorView A;               // (H), float32; negative in every Mamba model
  TensorView B;               // (B, L, G, N) T
  TensorView C;               // (B, L, G, N) T
  TensorView D;               // (H) or (H, P), float32, optional
  TensorView z;               // (B, L, H, P) T, optional
  TensorView dt_bias;         // (H), float32, optional
  TensorView initial_states;  // (B or S, H, P, N), float32, optional: zero when absent
  TensorView seq_idx;         // (B, L), int32, optional: one sequence per batch entry when absent
  std::int64_t sequences = 0;
  bool dt_softplus = false;
  double dt_min = 0.0;  // bounds of delta; its gradient is 0 outside of them
  double dt_max = std::numeric_limits<double>::infinity();
  bool reverse = false;
  int config = -1;  // row of CUDA's tables of kernels to force (tests, tuning); -1 chooses
};

struct ForwardParams {
  Inputs in;
  TensorView out;          // (B, L, H, P) T
  TensorView last_states;  // (B or S, H, P, N) float32: S after the last step that the scan visits
  TensorView checkpoints;  // (B, ceil(L / kCheckpointInterval), H, P, N) float32, optional: the
                           // state before each block of kCheckpointInterval steps, in the order of
                           // the scan: what the step before the block left, whatever sequence it
                           // belongs to, and what enters at the first step. For backward
  TensorView workspace;    // (forward_workspace(in)) float32, contiguous; scratch, on CUDA only
  void* stream = nullptr;  // cudaStream_t; unused on the CPU
};

struct BackwardParams {
  Inputs in;
  TensorView dout;          // (B, L, H, P) T
  TensorView dlast_states;  // (B or S, H, P, N) float32, optional: gradient of last_states
  TensorView checkpoints;   // as forward wrote it

  TensorView dx;               // (B, L, H, P) T
  TensorView ddt;              // (B, L, H), dt's dtype
  TensorView dA;               // (H) float32
  TensorView dB;               // (B, L, G, N) float32, contiguous
  TensorView dC;               // (B, L, G, N) float32, contiguous
  TensorView dD;               // shape of D, float32, present iff D is
  TensorView dz;               // (B, L, H, P) T, present iff z is
  TensorView ddt_bias;         // (H) float32, present iff dt_bias is
  TensorView dinitial_states;  // (B or S, H, P, N) float32, present iff initial_states is
  TensorView workspace;        // (backward_workspace(params)) float32, contiguous, 16-byte aligned;
                               // scratch, on CUDA only
  bool deterministic = false;
  void* stream = nullptr;
};

// Every output is overwritten whole. Sums have a fixed order, `deterministic` or not.
void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

// Elements that `workspace` has to have: 0 on the CPU, and for most calls of forward on CUDA too.
// They need shapes, dtypes and devices of what the scan reads, and check them as the calls do.
std::int64_t forward_workspace(const Inputs& in);
std::int64_t backward_workspace(const BackwardParams& params);

}  // namespace mamba_native::ssd
