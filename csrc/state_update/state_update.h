// One decode step of the selective state space, in place: Mamba-1 (one head a channel) and Mamba-2.
//
// For every batch b, head h, row p and state n, with g = h / (H / G) and s the row of `state` for
// b:
//   delta        = softplus?(dt[b,h,p] + dt_bias[h,p])
//   state'[p,n]  = state[s,h,p,n] exp(delta A[h,p,n]) + delta B[b,g,n] x[b,h,p]
//   out[b,h,p]   = (sum_n state'[p,n] C[b,g,n] + D[h,p] x[b,h,p]) silu?(z[b,h,p])
// The output uses the float32 state'; then state' is rounded to state's dtype and stored.
//
// Sizes: B batch, H heads, P headdim, N d_state, G groups (H % G == 0). Mamba-1 callers pass H = 1
// and P = D. B = 0 is valid. Dtypes: each tensor float32, float16 or bfloat16 on its own (float64
// on the CPU); out has x's dtype. Strides: any, 0 included: A, dt, dt_bias and D that are 0-stride
// over (P, N) take the fast path of Mamba-2 (one decay a head). Errors: mamba_native::Error naming
// the argument, before memory is touched.
#pragma once

#include "core/tensor.h"

namespace mamba_native::state_update {

struct Params {
  TensorView state;                // (B or entries, H, P, N), changed in place
  TensorView x;                    // (B, H, P)
  TensorView dt;                   // (B, H, P)
  TensorView A;                    // (H, P, N)
  TensorView B;                    // (B, G, N)
  TensorView C;                    // (B, G, N)
  TensorView D;                    // (H, P), optional
  TensorView z;                    // (B, H, P), optional
  TensorView dt_bias;              // (H, P), optional
  TensorView state_batch_indices;  // (B) int32 or int64, optional: state's row for each b; a
                                   // negative one gives an output row of 0 and touches no state.
                                   // One beyond the state is an Error on the CPU; on CUDA, where
                                   // nobody looks before the kernel does, its output is NaN and no
                                   // state is touched. Two equal ones race.
  TensorView out;                  // (B, H, P), x's dtype
  bool dt_softplus = false;
  void* stream = nullptr;  // cudaStream_t
};

void update(const Params& params);

}  // namespace mamba_native::state_update
