// The selective scan of Mamba-1 (Gu & Dao 2023, section 3.3, algorithm 2), forward and backward.
//
// For every batch b, channel d and state n, with g = d / (D / G):
//   delta[t] = softplus?(delta_in[b,d,t] + delta_bias[d])
//   h[t]     = exp(delta[t] A[d,n]) h[t-1] + delta[t] B[b,g,n,t] u[b,d,t]
//   h[-1]    = initial_state[b,d,n]
//   y[t]     = sum_n C[b,g,n,t] h[t] + D[d] u[b,d,t]
//   out[t]   = y[t] silu(z[b,d,t]) with z, y[t] without
//
// With `reverse` the scan runs from the last step to the first: h[t] follows h[t+1], initial_state
// enters at step L-1 and last_state is h[0]. It is the scan of the sequence read backwards, without
// a copy.
//
// `seq_idx` packs several sequences into a batch entry: the state starts from zero wherever seq_idx
// differs from the step visited before. initial_state still enters at the first step visited, and
// last_state is the state after the last one.
//
// `sequences` = S > 0 numbers them (B = 1, with seq_idx): states then have a row per sequence,
// (S, D, N) instead of (B, D, N). Sequence s is the steps with seq_idx = s, which must be adjacent;
// it starts from initial_state[s] and leaves last_state[s]. One without steps leaves the state it
// began with. Steps with an index outside [0, S) start from zero and leave nothing.
//
// A may be complex, and B, C and h with it; then y[t] = 2 Re(sum_n C h) + D u. Complex numbers are
// real tensors with a last dimension of 2, real and imaginary part: A, static B and C are
// (D, N, 2), time-varying B and C (B, G, N, L, 2), states (B or S, D, N, 2), checkpoints
// (B, D, ceil(L / kCheckpointInterval), N, 2), and gradients have the shapes of what they belong
// to: the derivatives by both parts. A's dimensions say which it is.
//
// Sizes: B batch, D channels, L length, N d_state, G groups of channels that share B and C (D % G
// == 0). B = 0, D = 0 and L = 0 are valid: outputs are empty, last_state is the initial state.
//
// Dtypes: u, delta, z, time-varying B and C share one dtype T of float32, float16, bfloat16 (or
// float64 on the CPU). Everything else is float32 (float64 if T is). Arithmetic and state are
// float32.
//
// Strides: any for every input, 0 included, and any alignment. Outputs may have any strides that do
// not overlap. `checkpoints` is contiguous.
//
// Errors: every function throws mamba_native::Error that names the argument, before memory is
// touched. CUDA work is enqueued on `stream` of the inputs' device, which the caller has made
// current; nothing synchronises or allocates, so calls can be captured in CUDA graphs.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace mamba_native::selective_scan {

// Steps between two stored states: `checkpoints` has ceil(L / kCheckpointInterval) of them.
inline constexpr std::int64_t kCheckpointInterval = 256;

// What forward and backward both read.
struct Inputs {
  TensorView u;              // (B, D, L) T
  TensorView delta;          // (B, D, L) T
  TensorView A;              // (D, N), float32; negative in every Mamba model
  TensorView B;              // (D, N) float32 or (B, G, N, L) T
  TensorView C;              // (D, N) float32 or (B, G, N, L) T
  TensorView D;              // (D), float32, optional
  TensorView z;              // (B, D, L) T, optional
  TensorView delta_bias;     // (D), float32, optional
  TensorView initial_state;  // (B or S, D, N), float32, optional: zero when absent
  TensorView seq_idx;        // (B, L), int32, optional: one sequence per batch entry when absent
  std::int64_t sequences = 0;
  bool delta_softplus = false;
  bool reverse = false;

  bool is_complex() const { return A.dim == 3; }
};

// Whether B or C varies with time, rather than being static.
inline bool is_varying(const TensorView& projection) { return projection.dim >= 4; }

struct ForwardParams {
  Inputs in;
  TensorView out;          // (B, D, L) T
  TensorView last_state;   // (B or S, D, N) float32: h after the last step that the scan visits
  TensorView checkpoints;  // (B, D, ceil(L / kCheckpointInterval), N) float32: the state that
                           // enters each block of kCheckpointInterval steps,
                           // in the order of the scan
  void* stream = nullptr;  // cudaStream_t; unused on the CPU
  int config = -1;         // row of the kernel table to force (tests, tuning); -1 chooses;
                           // unused with complex A
};

struct BackwardParams {
  Inputs in;
  TensorView dout;         // (B, D, L) T
  TensorView dlast_state;  // (B or S, D, N) float32, optional: gradient of last_state
  TensorView checkpoints;  // as forward wrote it

  TensorView du;              // (B, D, L) T
  TensorView ddelta;          // (B, D, L) T
  TensorView dA;              // (D, N) float32
  TensorView dB;              // shape of B, float32, contiguous
  TensorView dC;              // shape of C, float32, contiguous
  TensorView dD;              // (D) float32, present iff D is
  TensorView dz;              // (B, D, L) T, present iff z is
  TensorView ddelta_bias;     // (D) float32, present iff delta_bias is
  TensorView dinitial_state;  // (B or S, D, N) float32, present iff initial_state is
  bool deterministic = false;
  TensorView workspace;  // (backward_workspace(params)) float32, contiguous, 16-byte aligned;
                         // absent where that is 0
  void* stream = nullptr;
  int config = -1;
};

// Every output is overwritten whole. CUDA's backward sums dA, dB, dC, dD and ddelta_bias with
// float32 atomics, whose order varies between runs, unless `deterministic`: then every part of a
// sum has a place of its own in `workspace`, and they are added in a fixed order. The CPU's sums,
// and those with complex A, always have one.
void forward(const ForwardParams& params);
void backward(const BackwardParams& params);

// Elements that `workspace` has to have: 0 unless `deterministic` or with complex A on a CUDA
// device. Reads only `in`, `deterministic` and `config`.
std::int64_t backward_workspace(const BackwardParams& params);

}  // namespace mamba_native::selective_scan
