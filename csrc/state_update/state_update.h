// Decode steps of the selective state space, in place: Mamba-1 (one head a channel) and Mamba-2.
//
// For every batch b, token t in order, head h, row p and state n, with g = h / (H / G) and s the
// row of `state` for b:
//   delta        = min(max(softplus?(dt[b,t,h,p] + dt_bias[h,p]), dt_min), dt_max)
//   state'[p,n]  = state[s,h,p,n] exp(delta A[h,p,n]) + delta B[b,t,g,n] x[b,t,h,p]
//   out[b,t,h,p] = (sum_n state'[p,n] C[b,t,g,n] + D[h,p] x[b,t,h,p]) silu?(z[b,t,h,p])
// With A_is_log the decay rate is -exp(A) instead of A: layers keep log(-A) as their parameter.
// The output uses the float32 state'; then state' is rounded to state's dtype and stored. It is
// rounded after every token, so that T tokens at once give the bits of T calls.
//
// Sizes: B batch, T tokens, H heads, P headdim, N d_state, G groups (H % G == 0). Mamba-1 callers
// pass H = 1 and P = D. B = 0 and T = 0 are valid. One token may come without its axis: then x, dt,
// B, C, z and out all lack it. Dtypes: each tensor float32, float16 or bfloat16 on its own (float64
// on the CPU); out has x's dtype. Strides: any, 0 included: A, dt, dt_bias and D that are 0-stride
// over (P, N) take the fast path of Mamba-2 (one decay a head). Errors: mamba_native::Error naming
// the argument, before memory is touched.
#pragma once

#include <limits>

#include "core/tensor.h"

namespace mamba_native::state_update {

struct Params {
  TensorView state;                // (B or entries, H, P, N), changed in place
  TensorView x;                    // (B, T, H, P) or (B, H, P)
  TensorView dt;                   // (B, T, H, P) or (B, H, P)
  TensorView A;                    // (H, P, N)
  TensorView B;                    // (B, T, G, N) or (B, G, N)
  TensorView C;                    // (B, T, G, N) or (B, G, N)
  TensorView D;                    // (H, P), optional
  TensorView z;                    // (B, T, H, P) or (B, H, P), optional
  TensorView dt_bias;              // (H, P), optional
  TensorView state_batch_indices;  // (B) int32 or int64, optional: state's row for each b; a
                                   // negative one gives an output row of 0 and touches no state.
                                   // One beyond the state is an Error on the CPU; on CUDA, where
                                   // nobody looks before the kernel does, its output is NaN and no
                                   // state is touched. Two equal ones race.
  TensorView out;                  // shaped and typed as x
  bool dt_softplus = false;
  bool A_is_log = false;
  double dt_min = -std::numeric_limits<double>::infinity();  // bounds of delta
  double dt_max = std::numeric_limits<double>::infinity();
  void* stream = nullptr;  // cudaStream_t
};

void update(const Params& params);

}  // namespace mamba_native::state_update
